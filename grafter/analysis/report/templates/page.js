// The page, from the top down.
function showEnvironment() {
  const [one, other] = page.environments;
  if (one === undefined) {
    byId("environment").hidden = true;
    return;
  }
  const sides = other === undefined ? [one] : [one, other];
  const names = unique(sides.flatMap((side) => Object.keys(side.facts)));
  const rowOfFact = (name) => {
    const values = sides.map((side) => side.facts[name] ?? "");
    const differs = values.length > 1 && values[0] !== values[1];
    return [differs, make("tr", { class: differs && !page.own_facts.includes(name) ? "differs" : null }, make("th", { scope: "row", text: name }), ...values.map((value, n) => make("td", { text: value, "data-title": sides[n].title })))];
  };
  const tableOf = (rows) => make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, make("span", { class: "unseen", text: "Fact" })), ...sides.map((side) => make("th", { scope: "col", text: side.title })))),
    make("tbody", {}, ...rows));
  const rows = names.map((name) => [name, ...rowOfFact(name)]);
  // Settings that are the same in both jobs are rarely what somebody looks for.
  const first = rows.filter(([name, differs]) => differs || !name.startsWith("GRAFTER_"));
  const rest = rows.filter(([name, differs]) => !differs && name.startsWith("GRAFTER_"));
  const box = make("div", { class: "environment" }, tableOf(first.map((row) => row[2])));
  if (rest.length) box.append(make("details", {}, make("summary", { text: `${count(rest.length, "setting")} that ${rest.length === 1 ? "is" : "are"} the same in both` }), tableOf(rest.map((row) => row[2]))));
  byId("environment-body").append(box);
}

function showNavigation() {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const short = { findings: "Findings", verdict: "Verdict", divergence: "Divergence", adds: "Adds", point: "One point", points: "All points", timings: "Timings", environment: "Environment" }[section.id];
    byId("nav").append(make("a", { href: `#${section.id}`, text: short }));
  }
}

async function showPage() {
  byId("title").textContent = page.title;
  byId("source").textContent = page.source;
  showFindings();
  showVerdict();
  if (!page.points.length) {
    for (const id of ["divergence", "adds", "point", "points", "timings", "figures"]) byId(id).hidden = true;
  }
  showFigures();
  showTable();
  showEnvironment();
  try {
    await unpackPlotly();
  } catch (error) {
    for (const chart of document.querySelectorAll(".chart")) chart.replaceChildren(make("p", { text: `This browser cannot unpack the charts (${error}); the tables have all figures.` }));
  }
  showDivergence();
  showAdds();
  showPoint();
  showTimings();
  showNavigation();
  document.documentElement.dataset.ready = "true";
}

showPage();
