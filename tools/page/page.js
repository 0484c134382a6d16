"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const one = (id) => document.getElementById(id);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const folds = () => all("main details");

  // Light and dark: as the system has it until the button is pressed.
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const themed = () => { one("theme").textContent = dark() ? "Light" : "Dark"; draw(); };
  one("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; themed(); });
  system.addEventListener("change", themed);

  one("expand").addEventListener("click", () => folds().forEach((fold) => { fold.open = true; }));
  one("collapse").addEventListener("click", () => folds().forEach((fold) => { fold.open = false; }));
  one("changed").addEventListener("click", (event) => {
    const pressed = root.classList.toggle("only-changed");
    event.currentTarget.setAttribute("aria-pressed", String(pressed));
  });

  // The filter hides what does not hold the text, and opens what does; without text all is as it was.
  const opened = new Set();
  const texts = new Map();
  const text = (part) => {
    if (!texts.has(part)) {
      texts.set(part, [part.textContent, ...all("[title]", part).map((name) => name.title)].join(" ").toLowerCase());
    }
    return texts.get(part);
  };
  const reveal = (fold) => { if (!fold.open) { fold.open = true; opened.add(fold); } };
  const filter = () => {
    const wanted = one("filter").value.trim().toLowerCase();
    let hits = 0;
    opened.forEach((fold) => { fold.open = false; });
    opened.clear();
    const keep = (part) => {
      const kept = !wanted || text(part).includes(wanted);
      part.hidden = !kept;
      hits += kept ? 1 : 0;
      return kept;
    };
    for (const piece of all(".piece")) {
      const kept = all(".lines tbody tr", piece).filter(keep).length;
      piece.hidden = Boolean(wanted) && !kept;
      if (wanted && kept) reveal(piece);
    }
    for (const entry of all(".entry")) if (keep(entry) && wanted) reveal(entry);
    for (const fold of all(".fold, .numbers")) {
      const kept = all("tbody tr", fold).filter(keep).length;
      if (wanted && kept && fold.matches(".fold")) reveal(fold);
    }
    one("found").textContent = wanted ? `${hits} ${hits === 1 ? "line holds" : "lines hold"} “${wanted}”` : "";
  };
  let waiting = 0;
  one("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });

  // On paper everything is open.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = folds().filter((fold) => !fold.open && fold.dataset.state !== "same");
    closed.forEach((fold) => { fold.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((fold) => { fold.open = false; }));

  // A link into something that is closed opens it.
  const shown = () => {
    const target = location.hash.length > 1 && one(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  };
  window.addEventListener("hashchange", shown);
  document.addEventListener("click", (event) => { if (event.target.closest("main a")) setTimeout(shown); });
  shown();

  const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const number = (value) => {
    const size = Math.abs(value);
    const [unit, letter] = units.find(([least]) => size >= least) || [1, ""];
    if (size && size < 1e-3) return String(Number(value.toPrecision(2)));
    return `${Number((value / unit).toPrecision(3))}${letter ? ` ${letter}` : ""}`;
  };
  let charts = [];
  function draw() {
    charts.forEach((chart) => chart.destroy());
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--muted").trim();
    const grid = style.getPropertyValue("--line").trim();
    charts = (typeof Chart === "undefined" ? [] : all(".chart")).map((figure) => {
      const data = JSON.parse(figure.querySelector("script").textContent);
      const bars = data.labels.length > 0;
      const value = (series, index) => (series.points.find((point) => point.x === index) || { y: null }).y;
      const datasets = data.series.map((series) => ({
        label: series.name,
        data: bars ? data.labels.map((_, index) => value(series, index)) : series.points,
        backgroundColor: series.color,
        borderColor: series.color,
        borderWidth: bars ? 0 : 1.5,
        borderRadius: 2,
        borderDash: series.dashed ? [5, 4] : [],
        pointStyle: series.mark,
        pointRadius: series.line ? (series.dashed ? 0 : 2) : 4,
        pointHoverRadius: 6,
        showLine: series.line,
      }));
      const axis = (name) => ({
        title: { display: Boolean(name), text: name, color: ink },
        ticks: { color: ink },
        grid: { color: grid },
        border: { color: grid },
      });
      const scales = { x: axis(data.x), y: axis(data.y) };
      scales.y.type = data.logarithmic ? "logarithmic" : "linear";
      scales.y.ticks.callback = function (mark) {
        if (!data.logarithmic) return number(mark);
        const power = Math.log10(mark);
        return Math.abs(power - Math.round(power)) < 1e-6 || this.max < 30 * this.min ? number(mark) : "";
      };
      if (bars) { scales.x.grid.display = false; scales.x.ticks.maxRotation = 60; }
      else { scales.x.type = "linear"; scales.x.ticks.callback = number; }
      if (data.places !== null) {
        const step = Math.ceil(data.places / 16);
        scales.x.min = -0.5;
        scales.x.max = data.places - 0.5;
        scales.x.afterBuildTicks = (axis) => {
          axis.ticks = Array.from({ length: Math.ceil(data.places / step) }, (_, mark) => ({ value: mark * step }));
        };
      }
      return new Chart(figure.querySelector("canvas"), {
        type: bars ? "bar" : "scatter",
        data: { labels: bars ? data.labels : undefined, datasets },
        options: {
          animation: false,
          responsive: true,
          maintainAspectRatio: false,
          interaction: { mode: bars ? "index" : "nearest", intersect: !bars },
          scales,
          plugins: {
            legend: { display: data.series.length > 1, align: "start", labels: { color: ink, usePointStyle: !bars, boxWidth: 12, boxHeight: 8 } },
            tooltip: {
              callbacks: {
                label: (item) => {
                  const place = bars ? "" : ` (${number(item.parsed.x)}, ${number(item.parsed.y)})`;
                  const said = bars ? `: ${number(item.parsed.y)}` : item.raw.label ? `: ${item.raw.label}` : "";
                  return `${item.dataset.label}${said}${place}`;
                },
              },
            },
          },
        },
      });
    });
    root.dataset.drawn = String(charts.length);
  }
  requestAnimationFrame(() => setTimeout(themed));
})();
