"use strict";
// What moves in the page: figures, the theme, files to save, keys, links into closed parts.

const FONT = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
const THEMES = {
  light: { text: "#1b1f24", quiet: "#565e68", grid: "#d5d9de", page: "#ffffff", raised: "#f5f6f8" },
  dark: { text: "#e5e8ec", quiet: "#a2abb6", grid: "#363c45", page: "#15181d", raised: "#1e2228" },
};
const BUTTONS = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]; // none that sends data
const NARROW = 700; // pixels: below it the legend goes under the figure

const figures = {};
for (const element of document.querySelectorAll('script[type="application/json"]')) {
  figures[element.id.replace(/-data$/, "")] = JSON.parse(element.textContent);
}

function theme() {
  return document.documentElement.dataset.theme;
}

function axes(layout) {
  const names = Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
  return new Set(["xaxis", "yaxis", ...names]);
}

function layoutOf(view, colours, width) {
  const layout = structuredClone(view.layout);
  for (const name of axes(layout)) {
    layout[name] = {
      gridcolor: colours.grid,
      zerolinecolor: colours.grid,
      linecolor: colours.grid,
      automargin: true,
      ...layout[name],
    };
  }
  const many = view.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
  const below = width < NARROW;
  return {
    ...layout,
    font: { family: FONT, size: 13, color: colours.text },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colours.raised, bordercolor: colours.grid, font: { color: colours.text } },
    margin: { l: 60, r: 16, t: 40, b: 50 }, // above: the buttons of the figure
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.quiet, activecolor: colours.text },
    height: view.height,
    showlegend: many.length > 1 && !(below && many.length > 8),
    legend: below ? { orientation: "h", y: -0.2, yanchor: "top" } : { x: 1.02, xanchor: "left" },
  };
}

function shownView(id) {
  const select = document.querySelector(`select[data-view="${id}"]`);
  return figures[id].views[select ? Number(select.value) : 0];
}

function draw(id) {
  const plot = document.getElementById(`${id}-plot`);
  const view = shownView(id);
  plot.style.height = `${view.height}px`;
  const layout = layoutOf(view, THEMES[theme()], plot.clientWidth);
  const config = { responsive: true, displaylogo: false, modeBarButtons: [BUTTONS] };
  plot.place = null;
  return Plotly.react(plot, structuredClone(view.data), layout, config);
}

// Files -------------------------------------------------------------------------------------

function save(content, name) {
  const link = document.createElement("a");
  link.href = content;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
}

async function saveFigure(id, format) {
  if (format === "csv") {
    const blob = new Blob([figures[id].csv], { type: "text/csv" });
    const url = URL.createObjectURL(blob);
    save(url, `${id.replace(/-table$/, "")}.csv`);
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    return;
  }
  const view = shownView(id); // on white, whatever the page looks like
  const layout = { ...layoutOf(view, THEMES.light, 1000), width: 1000, paper_bgcolor: "#ffffff" };
  const picture = { data: structuredClone(view.data), layout };
  const options = { format, width: 1000, height: view.height, scale: format === "png" ? 2 : 1 };
  save(await Plotly.toImage(picture, options), `${id}.${format}`);
}

// Keys --------------------------------------------------------------------------------------

function lengthOf(trace) {
  return trace.type === "heatmap" ? trace.x.length * trace.y.length : trace.x.length;
}

function show(plot, trace, curve, number) {
  if (trace.type === "heatmap") {
    const width = trace.x.length;
    Plotly.Fx.hover(plot, { xval: number % width, yval: Math.floor(number / width) }, "xy");
  } else {
    const axes = (trace.xaxis ?? "x") + (trace.yaxis ?? "y");
    Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: number }], [axes]);
  }
}

function words(label) {
  const lines = [...label.querySelectorAll("tspan.line")].map((line) => line.textContent);
  const name = label.querySelector("text.name")?.textContent;
  return [name, ...(lines.length ? lines : [label.textContent])].filter(Boolean).join(", ");
}

function hoverable(plot) {
  return plot.data
    .map((trace, curve) => ({ trace, curve }))
    .filter(({ trace }) => trace.hoverinfo !== "skip" && trace.visible !== "legendonly" && lengthOf(trace));
}

function say(id, text) {
  document.getElementById(`${id}-said`).textContent = text;
}

function move(id, plot, along, across) {
  const traces = hoverable(plot);
  if (!traces.length) return;
  const place = plot.place ?? { trace: 0, point: along > 0 ? -1 : 0 };
  const isMap = traces[0].trace.type === "heatmap";
  if (across && !isMap) {
    place.trace = (place.trace + across + traces.length) % traces.length;
  }
  const { trace, curve } = traces[Math.min(place.trace, traces.length - 1)];
  const step = along + (isMap ? across * trace.x.length : 0);
  place.point = Math.max(0, Math.min(lengthOf(trace) - 1, place.point + step));
  plot.place = place;
  show(plot, trace, curve, place.point);
  say(id, [...plot.querySelectorAll(".hoverlayer .hovertext")].map(words).join("; "));
}

function zoom(plot, factor) {
  const change = {};
  for (const [name, axis] of Object.entries(plot._fullLayout)) {
    if (!/^[xy]axis\d*$/.test(name) || !axis.range || axis.matches) continue;
    const [low, high] = axis.range.map(Number);
    const middle = (low + high) / 2;
    const half = ((high - low) / 2) * factor;
    change[`${name}.range`] = [middle - half, middle + half];
  }
  Plotly.relayout(plot, change);
}

function follow(plot, id) {
  const place = plot.place;
  const target = place && hoverable(plot)[place.trace]?.trace.customdata?.[place.point];
  if (typeof target === "string") location.hash = target;
}

function onKey(id, plot, event) {
  const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  if (event.target !== plot || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in moves) move(id, plot, ...moves[event.key]);
  else if (event.key === "+" || event.key === "=") zoom(plot, 0.8);
  else if (event.key === "-") zoom(plot, 1.25);
  else if (event.key === "0") draw(id);
  else if (event.key === "Enter") follow(plot, id);
  else if (event.key === "Escape") { Plotly.Fx.unhover(plot); plot.place = null; say(id, ""); }
  else return;
  event.preventDefault();
}

// Beginning ---------------------------------------------------------------------------------

function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const closed = target?.closest("details:not([open])");
  if (closed) {
    closed.open = true;
    target.scrollIntoView();
  }
}

async function begin() {
  const drawn = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const id = plot.id.replace(/-plot$/, "");
    drawn.push(draw(id).then(() => {
      plot.on("plotly_click", ({ points }) => {
        if (typeof points[0]?.customdata === "string") location.hash = points[0].customdata;
      });
    }));
    plot.addEventListener("keydown", (event) => onKey(id, plot, event));
  }
  for (const select of document.querySelectorAll("select[data-view]")) {
    select.addEventListener("change", () => draw(select.dataset.view));
  }
  for (const button of document.querySelectorAll("button[data-save]")) {
    button.addEventListener("click", () => saveFigure(button.dataset.figure, button.dataset.save));
  }
  document.getElementById("theme").addEventListener("click", () => {
    const chosen = theme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    try { localStorage.setItem("tombola-theme", chosen); } catch { /* a browser that keeps nothing */ }
    Object.keys(figures).filter((id) => figures[id].views).forEach(draw);
  });
  addEventListener("hashchange", reveal);
  await Promise.all(drawn);
  reveal();
  document.documentElement.dataset.ready = "yes";
}

begin();
