"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const labels = JSON.parse(document.body.dataset.labels);
  const token = find("token");
  const drop = find("drop");
  const SVG = "http://www.w3.org/2000/svg";
  let shown = null;  // the preview's URL, given back when another photo comes
  let asked = 0;  // an answer that is not to the last question is not shown

  function element(name, text) {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  }

  function draw(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  }

  function radar(values) {
    const chart = find("radar");
    const title = chart.querySelector("title");
    const names = Object.keys(labels);
    const at = (index, radius) => {
      const angle = 2 * Math.PI * index / names.length - Math.PI / 2;
      return [radius * Math.cos(angle), radius * Math.sin(angle)].map((part) => part.toFixed(1));
    };
    const polygon = (radii) => names.map((_, index) => at(index, radii(index)).join(",")).join(" ");
    const parts = [25, 50, 75, 100].map((ring) => draw("polygon", {class: "ring", points: polygon(() => ring)}));
    names.forEach((name, index) => {
      const [x, y] = at(index, 100);
      const [left, top] = at(index, 114);
      const anchor = Math.abs(left) < 1 ? "middle" : left > 0 ? "start" : "end";
      parts.push(draw("line", {class: "spoke", x1: 0, y1: 0, x2: x, y2: y}));
      parts.push(draw("text", {x: left, y: Number(top) + 4, "text-anchor": anchor}, labels[name]));
    });
    parts.push(draw("polygon", {class: "area", points: polygon((index) => Math.max(0, Math.min(100, values[index])))}));
    chart.replaceChildren(title, ...parts);
  }

  function show(photo, name) {
    const values = Object.keys(labels).map((key) => photo["attribute_" + key]);
    find("result-title").textContent = name;
    find("quality").textContent = photo.quality_score.toFixed(2);
    find("interval").textContent = photo.quality_low === null ? "No interval: no scorer was trained for this bundle."
      : `Likely ${photo.quality_low.toFixed(1)} to ${photo.quality_high.toFixed(1)}`;
    const probability = Math.round(100 * photo["scene_" + photo.scene]);
    find("scene").textContent = `Scene: ${photo.scene.replaceAll("_", " ")} (${probability} %)`;
    find("caption").textContent = photo.caption || "";
    find("attributes").replaceChildren(...Object.keys(labels).map((key, index) => {
      const row = document.createElement("tr");
      const head = element("th", labels[key]);
      head.scope = "row";
      row.append(head, element("td", values[index].toFixed(1)));
      return row;
    }));
    radar(values);
    const suggestions = photo.suggestions || [];
    find("suggestions").replaceChildren(...suggestions.map((text) => element("li", text)));
    find("none").hidden = suggestions.length > 0;
    find("result").hidden = false;
    find("result").focus();
  }

  function preview(file) {
    if (shown) URL.revokeObjectURL(shown);
    shown = URL.createObjectURL(file);
    const image = find("preview");
    image.hidden = false;
    image.alt = "The photo that was judged";
    image.onerror = () => { image.hidden = true; };  // this browser cannot show it: HEIF, camera raw
    image.src = shown;
  }

  async function judge(file) {
    const question = ++asked;
    find("problem").textContent = "";
    find("result").hidden = true;
    find("status").textContent = `Judging ${file.name} …`;
    const form = new FormData();
    form.append("photo", file, file.name);
    const headers = token && token.value ? {Authorization: `Bearer ${token.value.trim()}`} : {};
    let complaint = null;
    try {
      const response = await fetch("v1/score", {method: "POST", body: form, headers, credentials: "omit"});
      const answer = await response.json();
      if (question !== asked) return;
      if (response.ok) {
        preview(file);
        show(answer, file.name);
      } else {
        complaint = `${file.name}: ${answer.error_kind.replaceAll("_", " ")}: ${answer.error_message}`;
      }
    } catch {
      complaint = "The service did not answer. Is it still running, and is the photo not too large?";
    }
    if (question !== asked) return;
    find("status").textContent = complaint ? "" : "Done.";
    find("problem").textContent = complaint || "";
  }

  find("form").addEventListener("submit", (event) => event.preventDefault());
  find("photo").addEventListener("change", (event) => {
    if (event.target.files.length) judge(event.target.files[0]);
    event.target.value = "";  // the same photo may be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  // Beside the box too: a browser would leave this page and open the photo.
  for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
  window.addEventListener("drop", (event) => {
    const file = event.dataTransfer && event.dataTransfer.files[0];
    if (file) judge(file);
  });
})();
