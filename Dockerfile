# The image of every node: Ray's own, with the package, what it stands on, and the jobs. Built where there is an engine:
#
#   make wheel && docker build -t picinspector:0.1.0 .
#   docker build --build-arg FLAVOUR= -t picinspector:0.1.0-cpu .      # without CUDA's libraries
#
# Bundles other than `builtin` go in with another COPY, or lie on a volume at one path on all nodes (deploy/README.md).
ARG FLAVOUR=-gpu
FROM rayproject/ray:2.60.0-py311${FLAVOUR}

COPY --chown=ray:users dist/ /tmp/dist/
# With what the training jobs need, so that one image does for all.
RUN pip install --no-cache-dir -c /tmp/dist/constraints.txt "$(ls /tmp/dist/*.whl)[train]" \
    && rm -r /tmp/dist
COPY --chown=ray:users jobs/ /opt/picinspector/jobs/
COPY --chown=ray:users training/ /opt/picinspector/training/
ENV PYTHONPATH=/opt/picinspector
# cluster.yaml says why.
ENV RAY_grpc_client_keepalive_time_ms=30000
ENV RAY_grpc_client_keepalive_timeout_ms=30000
ENV RAY_DATA_PARQUET_FOOTER_NUM_ACTORS=4
ENV RAY_JOB_STOP_WAIT_TIME_S=20
WORKDIR /home/ray
