"use strict";
// Everything from data goes through textContent and setAttribute: nothing here makes markup out of text.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* One budget at a time, and one measure in the heat map; all controls of a kind go together. */
const picked = { budget: "", measure: "" };

function showPicked() {
  for (const each of all("[data-budget]"))
    each.toggleAttribute("hidden", each.dataset.budget !== "" && each.dataset.budget !== picked.budget
      || "measure" in each.dataset && each.dataset.measure !== picked.measure);
}

function startPicks() {
  for (const kind of Object.keys(picked)) {
    const inputs = all(`[data-pick=${kind}] input`);
    // One budget alone has no control.
    picked[kind] = inputs[0]?.value ?? all("[data-budget]").map((each) => each.dataset.budget).find(Boolean) ?? "";
    for (const input of inputs)
      input.addEventListener("change", () => {
        picked[kind] = input.value;
        for (const other of inputs) other.checked = other.value === input.value;
        showPicked();
        showExample();
      });
  }
  showPicked();
}

/* Legends: each button shows and hides the lines of its name within its scope. */
function startLegends() {
  const shown = new Map();
  const of = (scope) => shown.get(scope) ?? shown.set(scope, new Set()).get(scope);
  const show = (scope) => {
    const names = of(scope);
    for (const root of all("[data-scope]").filter((each) => each.dataset.scope === scope))
      for (const each of all("[data-series]", root))
        if (each instanceof HTMLButtonElement) each.setAttribute("aria-pressed", names.has(each.dataset.series));
        else each.classList.toggle("off", !names.has(each.dataset.series));
  };
  for (const legend of all(".legend")) {
    const { scope } = legend.dataset, buttons = all("button[data-series]", legend);
    for (const button of buttons) {
      const name = button.dataset.series;
      if (button.getAttribute("aria-pressed") === "true") of(scope).add(name);
      button.addEventListener("click", () => { of(scope).delete(name) || of(scope).add(name); show(scope); });
      button.addEventListener("pointerenter", () => stress(scope, name));
      button.addEventListener("pointerleave", () => stress(scope, null));
    }
    const set = (selector, choose) => {
      for (const quick of all(selector, legend))
        quick.addEventListener("click", () => {
          shown.set(scope, new Set(buttons.filter((button) => choose(button, quick)).map((button) => button.dataset.series)));
          show(scope);
        });
    };
    set("[data-all]", () => true);
    set("[data-none]", () => false);
    set("[data-front]", (button) => "first" in button.dataset);
    set("[data-only]", (button, quick) => ["", quick.dataset.only].includes(button.dataset.group));
    show(scope);
  }
}

function stress(scope, name) {
  for (const chart of all("figure.chart").filter((each) => each.dataset.scope === scope)) {
    chart.classList.toggle("busy", name !== null);
    for (const each of all("[data-series]", chart)) each.classList.toggle("hot", each.dataset.series === name);
  }
}

/* Charts: the point nearest to the pointer, or chosen with the arrow keys, tells what it is. */
const tip = byId("tip");

function startCharts() {
  for (const chart of all("figure.chart")) {
    const svg = chart.querySelector("svg"), { scope } = chart.dataset;
    const points = all(".point", svg).map((node) => ({ node, x: +node.dataset.x, y: +node.dataset.y, line: node.parentNode }));
    const visible = () => points.filter(({ line }) => !line.hasAttribute("hidden") && !line.classList.contains("off"));
    let hot = null;
    const choose = (point) => {
      if (point === hot) return;
      hot?.node.classList.remove("hot");
      hot = point;
      hot?.node.classList.add("hot");
      stress(scope, hot ? hot.line.dataset.series : null);
      tip.hidden = !hot;
      if (hot) placeTip(hot.node);
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const near = visible().map((point) => [Math.hypot(point.x - x, point.y - y), point]).sort((a, b) => a[0] - b[0])[0];
      choose(near && near[0] < 26 ? near[1] : null);
    });
    svg.addEventListener("pointerleave", () => choose(null));
    svg.addEventListener("blur", () => choose(null));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") choose(null);
      if (!step) return;
      event.preventDefault();
      const among = visible(), at = among.indexOf(hot);
      if (among.length) choose(among[at < 0 ? (step > 0 ? 0 : among.length - 1) : (at + step + among.length) % among.length]);
    });
  }
}

function placeTip(node) {
  tip.textContent = node.dataset.tip;
  const at = (node.querySelector("use, circle") ?? node).getBoundingClientRect(), own = tip.getBoundingClientRect();
  const above = at.top - own.height - 10;
  tip.style.left = `${Math.max(6, Math.min(innerWidth - own.width - 6, at.left + at.width / 2 - own.width / 2))}px`;
  tip.style.top = `${above > 6 ? above : at.bottom + 10}px`;
}

/* The table: sorted by a click on a title, found by words that must all stand in a row. */
function startTable() {
  const table = document.querySelector("table.sortable"), body = table.tBodies[0], titles = all("th", table);
  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent;
    return text === "None" || text === "" ? null : isNaN(text) ? text : +text;
  };
  titles.forEach((title, column) => title.querySelector("button").addEventListener("click", () => {
    const number = title.classList.contains("number"), before = title.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? "descending" : "ascending") : number ? "descending" : "ascending";
    for (const each of titles) each.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((one, other) => {
      const a = value(one, column), b = value(other, column);
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    }));
  }));
  const find = byId("find"), found = byId("found");
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of body.rows) {
      const text = [...row.cells].slice(0, 3).map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    found.textContent = `${count} of ${body.rows.length} rows`;
  };
  find.addEventListener("input", filter);
  filter();
}

/* Examples: pictures with what was dropped dimmed, drawn when they are asked for. */
const gallery = byId("gallery") && JSON.parse(byId("gallery").textContent);

function startExamples() {
  if (!gallery) return;
  byId("example-task").addEventListener("change", () => { offerQuestions(); showExample(); });
  byId("example-layer").addEventListener("input", showExample);
  offerQuestions();
  showExample();
}

function offerQuestions() {
  const field = byId("example-number");
  all("label", field).forEach((label) => label.remove());
  gallery.tasks[byId("example-task").value].forEach((_, number) => {
    const input = element("input", { type: "radio", name: "example-number", value: number });
    input.checked = number === 0;
    input.addEventListener("change", showExample);
    field.append(element("label", {}, input, element("span", {}, String(number + 1))));
  });
}

function showExample() {
  if (!gallery) return;
  const layer = +byId("example-layer").value;
  byId("example-layer-shown").textContent = layer;
  const number = +document.querySelector("[name=example-number]:checked").value;
  const asked = gallery.tasks[byId("example-task").value][number];
  const cells = asked.cells.filter((cell) => cell.keep === "" || cell.keep === picked.budget);
  const whole = asked.pictures.map((picture) => picture.views.slice(-1).map((view) => look(picture, view, null)));
  byId("example").replaceChildren(
    element("div", { class: "question" },
      element("div", { class: "pictures" }, ...whole.flat()),
      element("div", {},
        element("blockquote", {}, asked.prompt),
        element("p", { class: "right" }, element("span", { class: "small" }, "right answer "), element("b", {}, asked.answer)))),
    element("div", { class: asked.pictures.flatMap((picture) => picture.views).length > 1 ? "answers many" : "answers" }, ...cells.map((cell) => answered(asked, cell, layer))));
}

function answered(asked, cell, layer) {
  let kept = 0, tokens = 0, seen = 0, shown = 0;
  const figures = asked.pictures.flatMap((picture, p) => picture.views.map((view, v) => {
    const alive = cell.depth[p][v].split(" ").map((depth) => +depth > layer);
    kept += alive.filter(Boolean).length;
    tokens += alive.length;
    seen += (view.evidence ?? []).filter((cell) => alive[cell]).length;
    shown += (view.evidence ?? []).length;
    return look(picture, view, alive, picture.views.length > 1 ? `${view.rows} × ${view.columns}` : "");
  }));
  const verdict = cell.score >= 1 ? "yes" : cell.score > 0 ? "partly" : "no";
  const spoken = { yes: "right", partly: "partly right", no: "wrong" }[verdict];
  return element("article", { class: "card" },
    element("div", {}, element("code", {}, cell.method)),
    element("div", { class: "pictures" }, ...figures),
    element("div", { class: `said ${verdict}`, title: spoken }, cell.prediction || "(nothing)"),
    element("div", { class: "small" }, `${kept} of ${tokens} tokens`, ...(shown ? [`, ${Math.round((100 * seen) / shown)} % of the evidence`] : [])));
}

/* A picture with a grid over it: cells that are not alive dimmed (none if null), evidence outlined. */
function look(picture, view, alive, caption = "") {
  const { uri, width, height } = gallery.images[picture.png], { rows, columns, evidence } = view;
  const w = width / columns, h = height / rows, at = (cell) => [(cell % columns) * w, Math.floor(cell / columns) * h];
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(drawing("image", { href: uri, width, height }));
  if (alive) {
    const dropped = alive.flatMap((lives, cell) => (lives ? [] : [cell]));
    const path = dropped.map((cell) => { const [x, y] = at(cell); return `M${x} ${y}h${w}v${h}h${-w}z`; }).join("");
    svg.append(drawing("path", { class: "dropped", d: path }));
    svg.setAttribute("aria-label", `picture, ${alive.length - dropped.length} of ${alive.length} tokens kept`);
  } else svg.setAttribute("aria-label", "the picture, evidence outlined");
  if (evidence?.length) {
    const inside = new Set(evidence), edges = [];
    for (const cell of evidence) {
      const [x, y] = at(cell), column = cell % columns;
      if (!inside.has(cell - columns)) edges.push(`M${x} ${y}h${w}`);
      if (!inside.has(cell + columns)) edges.push(`M${x} ${y + h}h${w}`);
      if (column === 0 || !inside.has(cell - 1)) edges.push(`M${x} ${y}v${h}`);
      if (column === columns - 1 || !inside.has(cell + 1)) edges.push(`M${x + w} ${y}v${h}`);
    }
    for (const kind of ["halo", "edge"]) svg.append(drawing("path", { class: `evidence ${kind}`, d: edges.join("") }));
  }
  return element("figure", {}, svg, ...(caption ? [element("figcaption", {}, caption)] : []));
}

startPicks();
startLegends();
startCharts();
startTable();
startExamples();
