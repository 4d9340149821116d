// All points: search, filter, sort by any column, a hundred rows at a time.
const PER_PAGE = 100;
const COLUMNS = [
  { name: "order", title: "#", numeric: true, value: (point) => point.order },
  { name: "step", title: "Step", numeric: true, value: (point) => point.step },
  { name: "label", title: "Point", value: (point) => point.label },
  { name: "direction", title: "Way", value: (point) => point.direction },
  { name: "outcome", title: "Outcome", value: (point) => point.outcome },
  { name: "shape", title: "Shape", value: (point) => shapeOf(point) || null, rank: (point) => point.shape?.reduce((size, dim) => size * dim, 1) ?? null },
  { name: "rel", title: "rel", numeric: true, value: (point) => (point.nonfinite ? Infinity : point.difference.rel ?? null), text: (value) => figure(value) },
  { name: "added", title: "Adds", numeric: true, value: (point) => point.added, text: (value) => figure(value) },
  { name: "inputs", title: "Inputs", numeric: true, value: (point) => point.inputs_rel, text: (value) => figure(value) },
  { name: "max_abs", title: "max |d|", numeric: true, value: (point) => point.difference.max_abs ?? null, text: (value) => figure(value) },
  { name: "cosine", title: "Cosine", numeric: true, value: (point) => point.difference.cosine ?? null, text: (value) => value.toFixed(6) },
  { name: "seconds", title: "Time", numeric: true, value: (point) => point.total || null, text: seconds },
  { name: "bytes", title: "Bytes", numeric: true, value: (point) => point.size_bytes || null, text: bytes },
];
const table = { sort: "order", down: false, from: 0, words: [], outcome: "", step: "", only: null };
let columns = [];
let shownRows = [];

const searchText = new Map();
function textOf(point) {
  if (!searchText.has(point)) searchText.set(point, [point.label, point.outcome, point.direction, point.reason, point.call_site, point.dtype, `step=${point.step}`, ...point.notes].join("\n").toLowerCase());
  return searchText.get(point);
}

function compare(a, b) {
  // What was not measured is last, whichever way.
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  const order = typeof a === "number" && typeof b === "number" ? a - b || 0 : String(a).localeCompare(String(b), "en", { numeric: true });
  return table.down ? -order : order;
}

function selectRows() {
  const column = COLUMNS.find(({ name }) => name === table.sort);
  const key = column.rank ?? column.value;
  return page.points
    .filter((point) => (table.only === null || table.only.has(point)) && (table.outcome === "" || point.outcome === table.outcome) && (table.step === "" || String(point.step) === table.step) && table.words.every((word) => textOf(point).includes(word)))
    .map((point) => [key(point), point])
    .sort((a, b) => compare(a[0], b[0]) || a[1].order - b[1].order)
    .map(([, point]) => point);
}

function rowOf(point) {
  const row = make("tr", { "data-order": point.order });
  for (const column of columns) {
    const value = column.value(point);
    const text = value === null ? "" : column.text ? column.text(value) : String(value);
    const cell = make("td", { class: column.numeric ? "number" : null, "data-name": column.name, "data-title": column.title });
    if (column.name === "label") {
      cell.append(make("button", { type: "button", class: point.guilty ? "choose guilty" : "choose", text, onclick: () => choosePoint(point.order, true) }));
      if (point.reason && isTrouble(point)) cell.append(make("span", { class: "why", text: clip(point.reason, 300) }));
    } else if (column.name === "outcome") {
      cell.append(make("span", { class: isTrouble(point) ? "outcome bad" : "outcome", text }));
    } else cell.textContent = text;
    row.append(cell);
  }
  return row;
}

function markChosen() {
  for (const row of byId("table").querySelectorAll("tbody tr")) {
    if (chosen !== null && row.dataset.order === String(chosen.order)) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
}

function fillTable() {
  shownRows = selectRows();
  table.from = Math.min(table.from, Math.max(0, Math.floor((shownRows.length - 1) / PER_PAGE) * PER_PAGE));
  const until = Math.min(table.from + PER_PAGE, shownRows.length);
  byId("table").tBodies[0].replaceChildren(...shownRows.slice(table.from, until).map(rowOf));
  for (const head of byId("table").tHead.rows[0].cells) {
    head.setAttribute("aria-sort", head.dataset.name !== table.sort ? "none" : table.down ? "descending" : "ascending");
  }
  byId("table-count").textContent = shownRows.length === page.points.length ? count(shownRows.length, "point") : `${shownRows.length.toLocaleString("en")} of ${count(page.points.length, "point")}`;
  byId("pager").hidden = shownRows.length <= PER_PAGE;
  byId("pager-place").textContent = `${(table.from + 1).toLocaleString("en")} to ${until.toLocaleString("en")} of ${shownRows.length.toLocaleString("en")}`;
  byId("pager-back").disabled = table.from === 0;
  byId("pager-on").disabled = until >= shownRows.length;
  markChosen();
}

// Only these points, until they are let go.
function listPoints(points) {
  table.only = points === null ? null : new Set(points);
  table.from = 0;
  byId("list-all").hidden = table.only === null;
  fillTable();
  if (points === null) byId("search").focus();
  else {
    byId("points").scrollIntoView();
    byId("list-all").focus({ preventScroll: true });
  }
}

function showTable() {
  columns = COLUMNS.filter((column) => column.name === "order" || column.name === "label" || page.points.some((point) => column.value(point) !== null))
    // One way for all says nothing.
    .filter((column) => column.name !== "direction" || unique(page.points.map((point) => point.direction)).length > 1);
  const sortBy = (column) => () => {
    // Figures are looked at from the largest on.
    table.down = table.sort === column.name ? !table.down : Boolean(column.numeric) && !["order", "step"].includes(column.name);
    table.sort = column.name;
    table.from = 0;
    fillTable();
  };
  byId("table").append(
    make("caption", { class: "unseen", text: "All points; the headers sort" }),
    make("thead", {}, make("tr", {}, ...columns.map((column) => make("th", { scope: "col", class: column.numeric ? "number" : null, "data-name": column.name },
      make("button", { type: "button", text: column.title, onclick: sortBy(column) }))))),
    make("tbody"));
  const again = (change) => (event) => { change(event.target.value); table.from = 0; fillTable(); };
  const outcomes = unique(page.points.map((point) => point.outcome));
  const steps = unique(page.points.map((point) => point.step)).sort((a, b) => a - b);
  const controls = byId("table-controls");
  controls.append(make("label", { class: "grow" }, "Search names, tags, reasons, call sites",
    make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false", oninput: again((text) => { table.words = text.toLowerCase().split(/\s+/).filter(Boolean); }) })));
  if (outcomes.length > 1) controls.append(make("label", {}, "Outcome", make("select", { id: "outcome", onchange: again((value) => { table.outcome = value; }) }, option("", "all"), ...outcomes.map((outcome) => option(outcome, outcome)))));
  if (steps.length > 1) controls.append(make("label", {}, "Step", make("select", { id: "step", onchange: again((value) => { table.step = value; }) }, option("", "all"), ...steps.slice(0, 2000).map((step) => option(step, step)))));
  const all = make("button", { type: "button", id: "list-all", text: "List all again", onclick: () => listPoints(null) });
  all.hidden = true;
  controls.append(all, make("output", { id: "table-count", "aria-live": "polite" }));
  const turn = (by) => () => { table.from += by; fillTable(); byId("points").scrollIntoView(); };
  byId("pager").append(make("button", { type: "button", id: "pager-back", text: "Back", onclick: turn(-PER_PAGE) }), make("output", { id: "pager-place" }), make("button", { type: "button", id: "pager-on", text: "On", onclick: turn(PER_PAGE) }));
  fillTable();
}
