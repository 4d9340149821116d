// What was skipped or failed, first; the verdict; the figures.
// Points with the same outcome for the same reason are one finding.
function groupAlike(points) {
  const groups = new Map();
  for (const point of points) {
    const key = `${point.outcome}\n${point.reason}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(point);
  }
  return [...groups.values()].slice(0, 100);
}

function describeAlike(points) {
  const [first] = points;
  const which = points.length === 1 ? `${first.label}, step ${first.step}` : `${count(points.length, "point")}, the first ${first.label}, step ${first.step}`;
  const show = make("button", { type: "button", class: "quiet link", text: points.length === 1 ? "Look at it" : "List them", onclick: () => (points.length === 1 ? choosePoint(first.order, true) : listPoints(points)) });
  return make("p", { class: "finding problem" }, make("b", { text: `${first.outcome}: ${which} ` }), show,
    make("span", { class: "why", text: first.reason || "no reason was recorded" }));
}

function showFindings() {
  const body = byId("findings-body");
  // A comparison's findings name its errors and skips already, and points beyond a threshold are what it is about.
  const troubled = page.kind === "comparison" ? [] : page.points.filter(isTrouble);
  const problems = page.findings.filter((finding) => finding.level === "problem");
  const notes = page.findings.filter((finding) => finding.level === "note");
  if (!troubled.length && !problems.length) {
    body.append(make("p", { class: "clear" }, make("span", { "aria-hidden": "true", text: "✓" }), make("span", { text: "Nothing was skipped, and nothing failed." })));
  }
  const list = make("div", { class: "findings-list" });
  for (const finding of problems) list.append(make("p", { class: "finding problem", text: finding.text }));
  for (const alike of groupAlike(troubled)) list.append(describeAlike(alike));
  if (list.childNodes.length > 4) Object.assign(list, { tabIndex: 0 }).setAttribute("aria-label", "What was skipped or failed");
  if (list.childNodes.length) body.append(list);
  const shown = notes.map((finding) => make("p", { class: "finding", text: finding.text }));
  if (notes.length > 3 || notes.some((note) => note.text.length > 240)) {
    body.append(make("details", {}, make("summary", { text: count(notes.length, "note") }), ...shown));
  } else body.append(...shown);
}

function showVerdict() {
  if (page.verdict === null) return;
  const { sentence, tone, details, order } = page.verdict;
  const body = byId("verdict-body");
  body.append(make("p", { class: `verdict ${tone}${sentence.length > 160 ? " long" : ""}`, text: sentence }));
  if (details.length) body.append(make("ul", { class: "verdict-details" }, ...details.map((text) => make("li", { text }))));
  if (order !== null && pointByOrder.has(order)) {
    body.append(make("div", { class: "controls" }, make("button", { type: "button", text: "Look at that point", onclick: () => choosePoint(order, true) })));
  }
  byId("verdict").hidden = false;
}

function showFigures() {
  const outcomes = new Map();
  for (const point of page.points) outcomes.set(point.outcome, (outcomes.get(point.outcome) || 0) + 1);
  const steps = unique(page.points.map((point) => point.step));
  const measured = page.points.filter((point) => point.difference.rel !== undefined);
  const figures = [["Points", page.points.length.toLocaleString("en")], ["Steps", steps.length]];
  for (const [outcome, n] of outcomes) figures.push([outcome[0].toUpperCase() + outcome.slice(1), n.toLocaleString("en"), TROUBLES.has(outcome)]);
  if (measured.length) {
    const bad = page.points.some((point) => point.nonfinite > 0);
    figures.push(["Largest rel", bad ? "NaN/Inf" : figure(largest(measured.map((point) => point.difference.rel)))]);
  }
  const size = page.points.reduce((sum, point) => sum + point.size_bytes, 0);
  if (size) figures.push(["Received", bytes(size)]);
  byId("figures").append(...figures.map(([name, value, alarm]) =>
    make("div", { class: alarm ? "alarm" : null }, make("dt", { text: name }), make("dd", { text: String(value) }))));
}
