// One point: its facts, where in the tensor it differs, and what values each side holds.
const pictureByOrder = new Map(page.pictures.map((picture) => [picture.order, picture]));
let chosen = null;
let pictureSelect = null;
let dimsSelect = null;
let sidesSelect = null;

function cellsOf(heatmap) {
  const raw = Uint8Array.from(atob(heatmap.codes), (letter) => letter.charCodeAt(0));
  const codes = new DataView(raw.buffer);
  const span = heatmap.high - heatmap.low;
  return Array.from({ length: heatmap.rows }, (_, row) => Array.from({ length: heatmap.columns }, (_, column) => {
    const code = codes.getUint16(2 * (row * heatmap.columns + column), true);
    return code === 0 ? 0 : code === 65535 ? Infinity : 10 ** (heatmap.low + (span * (code - 1)) / 65533);
  }));
}

// The indices of the tensor that a cell covers.
function covered(cell, cells, size) {
  const first = Math.ceil((cell * size) / cells);
  const last = Math.ceil(((cell + 1) * size) / cells) - 1;
  return last > first ? `${first}…${last}` : String(first);
}

function drawHeatmap(heatmap) {
  const cells = cellsOf(heatmap);
  const rowName = escaped(heatmap.row_dim || "");
  const columnName = escaped(heatmap.column_dim);
  const middle = (n, total, size) => Array.from({ length: n }, (_, cell) => ((cell + 0.5) * size) / total - 0.5);
  const x = middle(heatmap.columns, heatmap.columns, heatmap.column_size);
  const y = middle(heatmap.rows, heatmap.rows, heatmap.row_size);
  const hovertext = cells.map((row, r) => row.map((value, c) =>
    `${rowName ? `${rowName} ${covered(r, heatmap.rows, heatmap.row_size)}<br>` : ""}${columnName} ${covered(c, heatmap.columns, heatmap.column_size)}<br>largest |d| ${figure(value, 2)}`));
  const low = Math.floor(heatmap.low);
  const high = Math.max(Math.ceil(heatmap.high), low + 1);
  const ticks = [];
  for (let power = low; power <= high; power += Math.max(1, Math.ceil((high - low) / 6))) ticks.push(power);
  const traces = [{
    type: "heatmap", x, y, z: cells.map((row) => row.map((value) => (value > 0 && Number.isFinite(value) ? Math.log10(value) : null))), hovertext, hoverinfo: "text",
    zmin: heatmap.low, zmax: heatmap.high > heatmap.low ? heatmap.high : heatmap.low + 1, colorscale: "Cividis", hoverongaps: false,
    colorbar: { thickness: 12, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map((power) => `1e${power}`), title: { text: "largest |d|", side: "right", font: { size: 13 } } },
  }];
  const marks = (wanted) => cells.map((row) => row.map((value) => (wanted(value) ? 1 : null)));
  const flat = (name) => [[0, colour(name)], [1, colour(name)]];
  traces.push({ type: "heatmap", x, y, z: marks((value) => value === 0), hovertext, hoverinfo: "text", hoverongaps: false, showscale: false, colorscale: flat("grid") });
  traces.push({ type: "heatmap", x, y, z: marks((value) => !Number.isFinite(value)), hovertext, hoverinfo: "text", hoverongaps: false, showscale: false, colorscale: flat("alarm") });
  return draw("heatmap-chart", traces, {
    height: 380, xaxis: { title: { text: columnName }, showgrid: false, zeroline: false },
    yaxis: { title: { text: rowName }, autorange: "reversed", showgrid: false, zeroline: false, showticklabels: heatmap.row_size > 1 },
  }, `Where ${heatmap.row_dim} and ${heatmap.column_dim} differ most`);
}

function drawHistogram(histogram) {
  const bins = histogram.a.length;
  const width = (histogram.high - histogram.low) / bins;
  const edges = Array.from({ length: bins }, (_, bin) => histogram.low + bin * width);
  const side = (own, name, hue, dash) => ({
    type: "scatter", mode: "lines", name, x: edges.concat(histogram.high), y: own.concat(own[bins - 1]).map((n) => (n > 0 ? n : null)),
    line: { shape: "hv", width: 2, color: colour(hue), dash }, hoverinfo: "text",
    hovertext: own.concat(own[bins - 1]).map((n, bin) => { const at = Math.min(bin, bins - 1); return `${name}<br>${figure(edges[at], 2)} to ${figure(edges[at] + width, 2)}<br>${count(n, "value")}`; }),
  });
  const traces = [side(histogram.a, page.sides[0], "neutral", "solid"), side(histogram.b, page.sides[1], "accent", "dot")];
  return draw("histogram-chart", traces, {
    height: 380, showlegend: true, xaxis: { title: { text: "value" } }, yaxis: { type: "log", title: { text: "how many" }, dtick: 1, tickformat: "~s" },
  }, `Values of ${page.sides.join(" and ")}`);
}

// The number of differences of each size; from the comparison, so there are no values to draw.
function drawMagnitudes(magnitudes) {
  const power = (e) => figure(2 ** e, 1);
  const x = magnitudes.map((_, place) => place);
  const traces = [{
    type: "bar", x, y: magnitudes.map(([, n]) => n), marker: { color: colour("accent") }, hoverinfo: "text",
    hovertext: magnitudes.map(([e, n]) => `|d| ${e === null ? "is 0" : `from ${power(e)} to ${power(e + 1)}`}<br>${count(n, "value")}`),
  }];
  const every = Math.max(1, Math.ceil(magnitudes.length / 8));
  const shown = x.filter((place) => place % every === 0);
  return draw("histogram-chart", traces, {
    height: 380, bargap: 0.08, xaxis: { title: { text: "|d|" }, tickvals: shown, ticktext: shown.map((place) => (magnitudes[place][0] === null ? "0" : power(magnitudes[place][0]))), showgrid: false },
    yaxis: { type: "log", title: { text: "how many" }, dtick: 1, tickformat: "~s" },
  }, "The number of differences of each size");
}

function factsOf(point) {
  const facts = [["Point", point.label, true], ["Step", point.step], ["Outcome", `${point.outcome}${point.direction && point.direction !== "compare" ? ` (${point.direction})` : ""}`]];
  if (point.reason) facts.push(["Reason", point.reason, true]);
  if (point.notes.length) facts.push([point.notes.length > 1 ? "Notes" : "Note", point.notes.join("\n"), true]);
  const titles = new Map(MEASURES);
  for (const [name, value] of Object.entries(point.difference)) facts.push([titles.get(name) ?? name, name === "cosine" ? value.toPrecision(9) : figure(value, 3)]);
  if (point.nonfinite) facts.push(["NaN or Inf on one side", point.nonfinite]);
  if (point.added !== null) facts.push(["Adds (rel)", figure(point.added, 3)]);
  if (point.floor !== null) facts.push(["Its floor (rel)", figure(point.floor, 3)]);
  if (point.inputs_rel !== null) facts.push(["Its worst input (rel)", figure(point.inputs_rel, 3)]);
  if (point.worst_index !== null) facts.push(["Largest |d| is at", `[${point.worst_index.join(", ")}]: ${point.worst_values.map((value) => String(Number(number(value).toPrecision(8)))).join(" and ")}`]);
  if (shapeOf(point)) facts.push(["Tensor", `${shapeOf(point)} ${point.dtype || ""}${point.leaf ? ` (leaf ${point.leaf})` : ""}`]);
  if (point.size_bytes) facts.push(["Received", bytes(point.size_bytes)]);
  if (point.total) facts.push(["Time", seconds(point.total)]);
  if (point.ranks.length) facts.push(["Ranks", point.ranks.join(", ")]);
  if (point.call_site) facts.push(["Called at", point.call_site, true]);
  return facts;
}

function drawPicture() {
  const picture = chosen === null ? undefined : pictureByOrder.get(chosen.order);
  const heatmap = picture?.heatmaps[dimsSelect === null ? 0 : Number(dimsSelect.value)];
  const histogram = picture?.histogram;
  byId("heatmap-figure").hidden = !heatmap;
  const magnitudes = picture?.magnitudes ?? [];
  const sizeShown = magnitudes.length > 0 && (!histogram || sidesSelect?.value === "d");
  byId("histogram-figure").hidden = !histogram && !sizeShown;
  if (heatmap) {
    byId("heatmap-caption").textContent = `Where they differ: the largest |d| in each cell${heatmap.rows * heatmap.columns < heatmap.row_size * heatmap.column_size ? `, ${heatmap.rows}×${heatmap.columns} cells of ${heatmap.row_size}×${heatmap.column_size} values` : ""}. Flat cells are equal.`;
    drawHeatmap(heatmap);
  }
  if (sizeShown) {
    byId("histogram-caption").textContent = "The number of differences of each size.";
    drawMagnitudes(magnitudes);
  } else if (histogram) {
    const lost = histogram.nonfinite_a + histogram.nonfinite_b;
    byId("histogram-caption").textContent = `The values of both jobs${lost ? `; left out: ${histogram.nonfinite_a} and ${histogram.nonfinite_b} that are NaN or Inf` : ""}.`;
    drawHistogram(histogram);
  }
}

function choosePoint(order, scroll = false) {
  const point = pointByOrder.get(order);
  if (point === undefined) return;
  chosen = point;
  byId("point-facts").replaceChildren(...factsOf(point).filter(([, value]) => value !== "").map(([name, value, wide]) =>
    make("div", { class: wide ? "wide" : null }, make("dt", { text: name }), make("dd", { text: String(value) }))));
  const picture = pictureByOrder.get(order);
  const controls = byId("picture-controls");
  controls.replaceChildren();
  dimsSelect = sidesSelect = null;
  if (picture !== undefined && picture.heatmaps.length > 1) {
    dimsSelect = make("select", { onchange: drawPicture }, ...picture.heatmaps.map((map, n) => option(n, `${map.row_dim} by ${map.column_dim}`)));
    controls.append(make("label", {}, "Dims of the heatmap", dimsSelect));
  }
  if (picture?.histogram && picture.magnitudes.length) {
    sidesSelect = make("select", { onchange: drawPicture }, option("sides", "values of both sides"), option("d", "sizes of the differences"));
    controls.append(make("label", {}, "Histogram of", sidesSelect));
  }
  if (pictureSelect !== null) pictureSelect.value = picture === undefined ? "" : String(order);
  byId("pictures-note").textContent = picture?.why_none || (picture === undefined && page.pictures.length
    ? `No picture of this point is on the page. ${page.pictures_note}` : page.pictures_note);
  drawPicture();
  markChosen();
  if (scroll) {
    byId("point").scrollIntoView();
    byId("point-head").focus({ preventScroll: true });
  }
}

function showPoint() {
  byId("point-head").tabIndex = -1;
  if (!page.points.length) {
    byId("point").hidden = true;
    return;
  }
  if (page.pictures.length) {
    pictureSelect = make("select", { onchange: () => pictureSelect.value !== "" && choosePoint(Number(pictureSelect.value)) }, option("", "(chosen elsewhere)"),
      ...page.pictures.filter((picture) => pointByOrder.has(picture.order)).map((picture) => {
        const point = pointByOrder.get(picture.order);
        return option(picture.order, `${clip(point.label, 70)} · step ${point.step} · rel ${figure(point.difference.rel) || "–"}`);
      }));
    byId("point-controls").append(make("label", {}, "With pictures, the worst first", pictureSelect));
  }
  const worst = page.points.reduce((best, point) => ((point.difference.rel ?? -1) > (best.difference.rel ?? -1) ? point : best), page.points[0]);
  choosePoint(page.verdict?.order ?? page.pictures[0]?.order ?? worst.order);
  redraws.push(drawPicture);
}
