// A cursor over the curves: the values at the step under the pointer.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(chart.dataset.lines), [low, high, start, end] = JSON.parse(chart.dataset.x);
  const view = chart.viewBox.baseVal;
  const cursor = document.createElementNS(chart.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 8);
  cursor.setAttribute("y2", view.height - 22);
  const hide = () => { tip.style.display = "none"; cursor.remove(); };
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const wanted = low + (high - low) * ((event.clientX - box.left) * view.width / box.width - start) / (end - start);
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const step = nearest(lines.flatMap((line) => line[2]))[0];
    tip.replaceChildren(document.createTextNode("step " + Math.round(step)));
    for (const [label, color, points] of lines) {
      const point = nearest(points);
      if (Math.abs(point[0] - step) > (high - low) / 40) continue;
      const row = tip.appendChild(document.createElement("div"));
      row.appendChild(document.createElement("i")).style.background = `var(--${color})`;
      row.append(`${label} ${point[1]}`);
    }
    const x = start + (end - start) * (step - low) / (high - low);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    chart.append(cursor);
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  });
}

// A page that renews itself keeps open what the reader has opened. (Browsers keep the place in it by themselves.)
if (document.querySelector("meta[http-equiv=refresh]")) {
  const folds = new Map();
  for (const section of document.querySelectorAll("section")) {
    section.querySelectorAll("details").forEach((fold, i) => folds.set(`${section.id}/${i}`, fold));
  }
  const known = JSON.parse(sessionStorage.getItem("folds") || "{}");
  for (const [name, fold] of folds) {
    if (name in known) fold.open = known[name];
    fold.addEventListener("toggle", () => {
      known[name] = fold.open;
      sessionStorage.setItem("folds", JSON.stringify(known));
    });
  }
}
