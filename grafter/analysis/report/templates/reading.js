// The data, and small helpers. Every text goes through textContent; no text of the data is ever taken for HTML.
const byId = (id) => document.getElementById(id);
const page = JSON.parse(byId("data").textContent);
const number = (value) => (typeof value === "string" ? Number(value) : value);

page.points = page.rows.map((row) => {
  const point = Object.fromEntries(page.columns.map((column, place) => [column, row[place]]));
  for (const [name, value] of Object.entries(point.difference)) point.difference[name] = number(value);
  point.added = number(point.added);
  point.floor = number(point.floor);
  point.inputs_rel = number(point.inputs_rel);
  for (const [stage, value] of Object.entries(point.seconds)) point.seconds[stage] = number(value);
  point.total = Object.values(point.seconds).reduce((sum, value) => sum + value, 0);
  return point;
});
delete page.rows;
const pointByOrder = new Map(page.points.map((point) => [point.order, point]));
const TROUBLES = new Set(["failed", "skipped", "error"]);
const isTrouble = (point) => TROUBLES.has(point.outcome);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function option(value, text, chosen = false) {
  const element = make("option", { value, text });
  element.selected = chosen;
  return element;
}

// A difference: two digits, 0 where it is 0.
function figure(value, digits = 1) {
  if (value === null || value === undefined) return "";
  if (!Number.isFinite(value)) return "NaN/Inf";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e4 ? String(Number(value.toPrecision(digits + 2))) : value.toExponential(digits);
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${Number(value.toPrecision(3))} ${units[unit]}`;
}

function seconds(value) {
  if (!Number.isFinite(value)) return "";
  if (value >= 100) return `${Math.round(value)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 1e-3) return `${Number((value * 1e3).toPrecision(3))} ms`;
  return `${Number((value * 1e6).toPrecision(3))} µs`;
}

const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const shapeOf = (point) => (point.shape === null ? "" : point.shape.length ? point.shape.join("×") : "scalar");
const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
// The largest, without spreading thousands of arguments.
const largest = (values) => values.reduce((best, value) => (value > best ? value : best), -Infinity);
const smallest = (values) => values.reduce((best, value) => (value < best ? value : best), Infinity);
const unique = (values) => [...new Set(values)];
