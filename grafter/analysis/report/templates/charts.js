// The charts, by plotly, which the page carries packed. Its labels take a little HTML, so names are escaped for it.
const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const touch = matchMedia("(pointer: coarse)").matches;
const narrow = () => innerWidth < 640;
let plotly = null;

async function unpackPlotly() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  plotly = window.Plotly;
}

function draw(id, traces, layout, label) {
  const box = byId(id);
  box.setAttribute("aria-label", label);
  if (plotly === null) return Promise.resolve();
  const axis = {
    gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("grid"), tickcolor: colour("line"),
    automargin: true, fixedrange: touch,
  };
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: narrow() ? 320 : 380, margin: { l: 12, r: 12, t: 16, b: 12 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("soft") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 13 }, align: "left" },
    dragmode: touch ? false : "zoom", hovermode: "closest", showlegend: false, barcornerradius: 2,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left" },
    ...layout, xaxis: withTitle({ ...axis, ...layout.xaxis }), yaxis: withTitle({ ...axis, ...layout.yaxis }),
  };
  box.classList.remove("silent");
  if (layout.height === undefined && full.xaxis.tickangle) full.height += 70;
  return plotly.react(box, traces, full, { displayModeBar: false, responsive: true, doubleClick: "reset" });
}

function withTitle(axis) {
  const { title, ...rest } = axis;
  return title?.text ? { ...rest, title: { text: title.text, standoff: 10, font: { size: 13 } } } : rest;
}

function silence(id) {
  const box = byId(id);
  if (plotly !== null && box.data) plotly.purge(box);
  box.classList.add("silent");
}

// A logarithmic axis on which 0 has a place, one decade below the smallest, and NaN or Inf one above the largest.
function logAxis(values) {
  const positive = values.filter((value) => Number.isFinite(value) && value > 0);
  const low = positive.length ? Math.floor(Math.log10(smallest(positive))) : -1;
  const high = positive.length ? Math.max(Math.ceil(Math.log10(largest(positive))), low + 1) : 0;
  const hasZero = values.some((value) => value === 0);
  const hasBad = values.some((value) => !Number.isFinite(value));
  const bottom = hasZero ? low - 1 : low;
  const top = hasBad ? high + 1 : high;
  const every = Math.max(1, Math.ceil((high - low) / 8));
  const ticks = [];
  for (let power = low; power <= high; power += every) ticks.push([power, `1e${power}`]);
  if (hasZero) ticks.unshift([bottom, "0"]);
  if (hasBad) ticks.push([top, "NaN/Inf"]);
  return {
    place: (value) => (value === null || value === undefined ? null : !Number.isFinite(value) ? top : value > 0 ? Math.log10(value) : bottom),
    bottom, top,
    axis: { range: [bottom - 0.35, top + 0.35], tickvals: ticks.map((tick) => tick[0]), ticktext: ticks.map((tick) => tick[1]), zeroline: false },
  };
}

// Places: the points of all steps, in the order of the program; what the x axis counts.
function placesOf(points) {
  const places = new Map();
  for (const point of points) if (!places.has(point.label)) places.set(point.label, { number: places.size, point });
  return places;
}

// The dotted beginning that all names share says nothing.
function commonStart(names) {
  let start = names[0] || "";
  for (const name of names) while (!name.startsWith(start)) start = start.slice(0, -1);
  const dot = start.lastIndexOf(".");
  return dot < 0 ? 0 : dot + 1;
}

function placeAxis(places) {
  const all = [...places.values()].map((place) => place.point);
  const layers = all.map((point) => point.layer);
  const isOneName = unique(all.map((point) => point.name)).length === 1 && layers.every((layer) => layer !== null);
  const start = commonStart(unique(all.map((point) => point.name)));
  const text = (point) => {
    if (isOneName) return String(point.layer);
    const rest = point.label.slice(point.name.length).replace(/\b\w*(layer|block)\w*=(\d+)/, "$2");
    const whole = point.name.slice(start) + rest;
    // The end tells more than the beginning.
    return whole.length > 24 ? `…${whole.slice(-23)}` : whole;
  };
  const most = narrow() ? 8 : isOneName ? 40 : 24;
  const every = Math.max(1, Math.ceil(all.length / most));
  const slanted = !isOneName && (all.length > 6 || narrow());
  const shown = all.map((point, place) => [place, point]).filter(([place]) => place % every === 0);
  return {
    tickvals: shown.map(([place]) => place), ticktext: shown.map(([, point]) => escaped(text(point))),
    range: [-0.6, Math.max(all.length, 2) - 0.4], showgrid: false, zeroline: false,
    tickangle: slanted ? -40 : 0, title: { text: isOneName ? "layer" : "" },
  };
}

function hoverOf(point, extra = []) {
  const lines = [`<b>${escaped(clip(point.label, 90))}</b>`, `step ${point.step} · ${escaped(point.outcome)}`, ...extra];
  for (const [name, title] of [["rel", "rel"], ["max_abs", "max |d|"], ["cosine", "cosine"]]) {
    if (point.difference[name] !== undefined) lines.push(`${title} ${name === "cosine" ? point.difference[name].toPrecision(7) : figure(point.difference[name], 2)}`);
  }
  if (point.nonfinite) lines.push(`${point.nonfinite} values NaN or Inf on one side`);
  if (shapeOf(point)) lines.push(escaped(clip(`${shapeOf(point)} ${point.dtype || ""}`, 60)));
  if (isTrouble(point) && point.reason) lines.push(escaped(clip(point.reason, 120)));
  return lines.join("<br>");
}

function onPointClick(id) {
  byId(id).on?.("plotly_click", (event) => {
    const order = event.points[0]?.customdata;
    if (order !== undefined && order !== null) choosePoint(order, true);
  });
}

const MEASURES = [["rel", "rel"], ["rel_l2", "relative L2"], ["max_abs", "largest |d|"], ["mean_abs", "mean |d|"], ["distance", "1 − cosine"], ["mismatched_fraction", "share of unequal values"]];
const LINES = 24;
const MOST_PLACES = 120;

function valueOf(point, measure) {
  if (point.nonfinite) return NaN;
  if (measure !== "distance") return point.difference[measure];
  // Rounding may put a cosine above 1.
  return point.difference.cosine === undefined ? undefined : Math.max(0, 1 - point.difference.cosine);
}

// From a pale to a deep shade of the accent.
function shade(share) {
  const [from, to] = [colour("pale"), colour("accent")].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return `rgb(${from.map((channel, n) => Math.round(channel + (to[n] - channel) * share)).join(",")})`;
}

function chooseSteps(points) {
  const steps = unique(points.map((point) => point.step)).sort((a, b) => a - b);
  if (steps.length <= LINES) return steps;
  const worst = points.reduce((best, point) => ((point.difference.rel ?? -1) > (best.difference.rel ?? -1) ? point : best), points[0]).step;
  const spread = Array.from({ length: LINES - 1 }, (_, n) => steps[Math.round((n * (steps.length - 1)) / (LINES - 2))]);
  return unique([...spread, worst]).sort((a, b) => a - b);
}

function drawDivergence(name, measure) {
  const points = page.points.filter((point) => name === "" || point.name === name);
  const places = placesOf(points);
  const steps = chooseSteps(points);
  const values = points.map((point) => valueOf(point, measure)).filter((value) => value !== undefined);
  const scale = logAxis(values);
  const byStep = new Map(steps.map((step) => [step, []]));
  for (const point of points) byStep.get(point.step)?.push(point);
  const traces = steps.map((step, n) => {
    const line = byStep.get(step).slice().sort((a, b) => places.get(a.label).number - places.get(b.label).number);
    const own = line.map((point) => valueOf(point, measure));
    return {
      type: "scatter", mode: points.length > 3000 ? "lines" : "lines+markers", name: `step ${step}`, showlegend: steps.length > 1 && steps.length <= 8,
      x: line.map((point) => places.get(point.label).number), y: own.map(scale.place), customdata: line.map((point) => point.order),
      hoverinfo: "text", hovertext: line.map((point) => hoverOf(point)), connectgaps: false,
      line: { width: 2, color: shade(steps.length < 2 ? 1 : 0.15 + (0.85 * n) / (steps.length - 1)) },
      marker: {
        opacity: 1,
        size: own.map((value, at) => (line[at].guilty ? 11 : 7)),
        symbol: own.map((value) => (value === 0 ? "circle-open" : Number.isNaN(value) ? "x" : "circle")),
        color: line.map((point) => (point.guilty ? colour("alarm") : shade(steps.length < 2 ? 1 : 0.15 + (0.85 * n) / (steps.length - 1)))),
      },
    };
  });
  // Of those beyond a threshold the line has the value.
  const troubled = points.filter((point) => isTrouble(point) && valueOf(point, measure) === undefined);
  if (troubled.length) {
    traces.push({
      type: "scatter", mode: "markers", name: "skipped or failed", x: troubled.map((point) => places.get(point.label).number),
      y: troubled.map(() => scale.bottom - 0.2), customdata: troubled.map((point) => point.order), hoverinfo: "text",
      hovertext: troubled.map((point) => hoverOf(point)), cliponaxis: false, marker: { symbol: "x-thin", size: 9, line: { width: 2, color: colour("alarm") } },
    });
  }
  const title = MEASURES.find(([key]) => key === measure)[1];
  const all = unique(points.map((point) => point.step)).length;
  byId("divergence-caption").textContent =
    (steps.length < all ? `${steps.length} of ${all} steps are drawn: evenly spread, and the worst. ` : "") +
    (steps.length > 8 ? "Pale lines are early steps, deep ones late. " : "") +
    "Hover for details, click to look at a point" + (touch ? "." : ", drag to zoom, double-click to reset.");
  return draw("divergence-chart", traces, {
    xaxis: placeAxis(places), yaxis: { ...scale.axis, title: { text: title } }, showlegend: (steps.length > 1 && steps.length <= 8) || troubled.length > 0,
  }, `${title} of ${count(points.length, "point")}, one line per step; the table of all points has the same figures.`);
}

// All points, unless these are too many to tell apart: then of those names that most layers have, the last.
function firstName(names) {
  if (placesOf(page.points).size <= MOST_PLACES) return "";
  const layers = new Map(names.slice(0, 500).map((name) => [name, new Set()]));
  for (const point of page.points) layers.get(point.name)?.add(point.label);
  return [...layers].reduce((best, own) => (own[1].size >= best[1].size ? own : best))[0];
}

function showDivergence() {
  if (!page.points.length) return;
  byId("measured").textContent = page.measured;
  const names = unique(page.points.map((point) => point.name));
  const available = MEASURES.filter(([key]) => page.points.some((point) => valueOf(point, key) !== undefined && !point.nonfinite));
  if (!available.length) {
    silence("divergence-chart");
    byId("divergence-caption").textContent = "No differences were recorded: nothing was compared, or GRAFTER_STATS is off.";
    return;
  }
  const first = firstName(names);
  const nameChoice = make("select", {}, option("", "all, in the order of the program", first === ""), ...names.slice(0, 500).map((name) => option(name, clip(name, 80), name === first)));
  const measureChoice = make("select", {}, ...available.map(([key, title]) => option(key, title)));
  const redraw = () => drawDivergence(nameChoice.value, measureChoice.value);
  for (const choice of [nameChoice, measureChoice]) choice.addEventListener("change", redraw);
  if (names.length > 1) byId("divergence-controls").append(make("label", {}, "Points", nameChoice));
  if (available.length > 1) byId("divergence-controls").append(make("label", {}, "Measure", measureChoice));
  redraws.push(redraw);
  redraw()?.then(() => onPointClick("divergence-chart"));
}

// Where nothing was grafted: a module's output against its inputs.
function againstInputs() {
  return page.points.filter((point) => point.inputs_rel !== null && (point.nonfinite || point.difference.rel !== undefined))
    .map((point) => ({ ...point, added: point.nonfinite ? NaN : point.difference.rel, floor: point.inputs_rel }));
}

function showAdds() {
  const isAdded = page.points.some((point) => point.added !== null);
  const points = isAdded ? page.points.filter((point) => point.added !== null) : againstInputs();
  byId("adds-lead").textContent = page.adds_note;
  if (!points.length) { silence("adds-chart"); return; }
  const what = isAdded ? "adds" : "output";
  const dash = isAdded ? "its floor" : "its worst input";
  const worst = new Map();
  for (const point of points) {
    const before = worst.get(point.label);
    if (before === undefined || !(point.added <= before.added)) worst.set(point.label, point);
  }
  const shown = [...worst.values()];
  const withFloor = shown.filter((point) => point.floor !== null);
  if (isAdded) {
    byId("adds-lead").textContent = "The difference that each point itself adds, given the other job's values. The worst over steps." +
      (withFloor.length ? " The dash is its floor: what it adds without the fault." : "");
  } else byId("adds-lead").textContent += " Bars are outputs, dashes the worst of their inputs.";
  const redraw = () => {
    const places = placesOf(shown);
    const scale = logAxis([...shown.map((point) => point.added), ...withFloor.map((point) => point.floor)]);
    const base = scale.bottom;
    const traces = [{
      type: "bar", x: shown.map((point) => places.get(point.label).number), base, width: 0.62,
      y: shown.map((point) => scale.place(point.added) - base), customdata: shown.map((point) => point.order), hoverinfo: "text",
      hovertext: shown.map((point) => hoverOf(point, [`${what} ${figure(point.added, 2)}`, ...(point.floor === null ? [] : [`${dash} ${figure(point.floor, 2)}`])])),
      marker: { color: shown.map((point) => colour(point.guilty ? "bar-alarm" : "bar")) },
      text: shown.map((point) => (point.guilty ? "culprit" : point.added === 0 ? "0" : "")), textposition: "outside", cliponaxis: false, textfont: { color: colour("ink") },
    }];
    if (withFloor.length) {
      traces.push({
        type: "scatter", mode: "markers", x: withFloor.map((point) => places.get(point.label).number), y: withFloor.map((point) => scale.place(point.floor)),
        customdata: withFloor.map((point) => point.order), hoverinfo: "text", hovertext: withFloor.map((point) => hoverOf(point, [`${dash} ${figure(point.floor, 2)}`])),
        marker: { symbol: "line-ew", size: Math.max(6, Math.min(26, (0.4 * byId("adds-chart").clientWidth) / shown.length)), line: { width: 2, color: colour("ink") } },
      });
    }
    return draw("adds-chart", traces, { xaxis: placeAxis(places), yaxis: { ...scale.axis, range: [base, scale.top + 0.6], title: { text: isAdded ? "rel that it adds" : "rel" } } },
      `${isAdded ? "What each adds" : "Outputs against inputs"}, of ${count(shown.length, "point")}; the table of all points has the same figures.`);
  };
  redraws.push(redraw);
  redraw()?.then(() => onPointClick("adds-chart"));
}

function showTimings() {
  if (!page.points.length) return;
  const body = byId("timings-body");
  const timed = page.points.filter((point) => point.total > 0);
  if (!timed.length) {
    body.append(make("p", { class: "lead", text: page.kind === "comparison" ? "Dumps were compared: nothing was exchanged." : "No timings were recorded." }));
    silence("timings-chart");
    return;
  }
  const stages = unique(timed.flatMap((point) => Object.keys(point.seconds)));
  const rows = stages.map((stage) => {
    const own = timed.map((point) => point.seconds[stage]).filter((value) => value !== undefined).sort((a, b) => a - b);
    return { stage, sum: own.reduce((sum, value) => sum + value, 0), median: own[own.length >> 1], worst: own[own.length - 1] };
  }).sort((a, b) => b.sum - a.sum);
  const most = rows[0].sum || 1;
  const fill = (share) => { const bar = make("span", { class: "fill" }); bar.style.width = `${100 * share}%`; return bar; };
  body.append(
    make("p", { class: "lead", text: `For each point, the slowest rank. ${seconds(timed.reduce((sum, point) => sum + point.total, 0))} in all; pairing includes the wait for the other side.` }),
    make("table", { class: "stages" },
      make("thead", {}, make("tr", {}, ...["Stage", "All", "Median", "Slowest", ""].map((text, n) => make("th", { scope: "col", class: n % 4 ? "number" : null, text })))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, make("th", { scope: "row", text: row.stage }),
        ...[row.sum, row.median, row.worst].map((value) => make("td", { class: "number", text: seconds(value) })), make("td", { class: "bar" }, fill(row.sum / most)))))));
  const slowest = timed.slice().sort((a, b) => b.total - a.total).slice(0, narrow() ? 8 : 12).reverse();
  const redraw = () => {
    const traces = rows.map((row, n) => ({
      type: "bar", orientation: "h", name: escaped(row.stage), y: slowest.map((_, place) => place), x: slowest.map((point) => point.seconds[row.stage] || 0),
      customdata: slowest.map((point) => point.order), hoverinfo: "text", marker: { color: shade(rows.length < 2 ? 1 : 1 - n / (rows.length - 1)), line: { width: 1, color: colour("card") } },
      hovertext: slowest.map((point) => `<b>${escaped(clip(point.label, 60))}</b><br>step ${point.step}<br>${escaped(row.stage)} ${seconds(point.seconds[row.stage] || 0)} of ${seconds(point.total)}`),
    }));
    return draw("timings-chart", traces, {
      barmode: "stack", showlegend: true, height: 110 + 26 * slowest.length, xaxis: { title: { text: "seconds, the slowest points" } },
      yaxis: { tickvals: slowest.map((_, place) => place), ticktext: slowest.map((point) => escaped(`${clip(point.label, narrow() ? 18 : 40)} · ${point.step}`)), showgrid: false },
    }, "The slowest points, by stage.");
  };
  redraws.push(redraw);
  redraw()?.then(() => onPointClick("timings-chart"));
}
