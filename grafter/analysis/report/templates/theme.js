// Light or dark: as the system has it, until somebody chooses.
const THEMES = ["auto", "light", "dark"];
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
const redraws = [];

function storedTheme() {
  // A page opened from a file may have no storage.
  try { return localStorage.getItem("grafter-report-theme"); } catch { return null; }
}

function applyTheme(chosen) {
  theme = THEMES.includes(chosen) ? chosen : "auto";
  byId("theme").textContent = `Theme: ${theme}`;
  paint(theme === "dark" || (theme === "auto" && systemIsDark.matches));
}

function paint(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  for (const redraw of redraws) redraw();
}

// Paper is white.
addEventListener("beforeprint", () => paint(false));
addEventListener("afterprint", () => applyTheme(theme));

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("grafter-report-theme", next); } catch { /* it holds for this visit */ }
  applyTheme(next);
});
systemIsDark.addEventListener("change", () => applyTheme(theme));

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
applyTheme(storedTheme());
