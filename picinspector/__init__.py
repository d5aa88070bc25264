"""PicInspector: quality, attributes and scenes for whole photo libraries, as Parquet tables."""

__version__ = "0.1.0"
