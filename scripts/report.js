"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);
const read = (id) => JSON.parse(one("#" + id)?.textContent ?? "null");

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// --- tables: sort and filter ---------------------------------------------------------------------------------------

function compare(a, b, sign) { // numbers by value, other text by its words; missing values last in both directions
  const [x, y] = [a, b].map((cell) => (cell.dataset.v === undefined ? null : Number(cell.dataset.v)));
  if (x === null || y === null) {
    const order = (x !== null) - (y !== null) || a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    return sign * order;
  }
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
  return x === y ? 0 : sign * (x < y ? -1 : 1);
}

function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const numeric = table.tBodies[0].rows[0].cells[column].matches(".num, .bar");
  const before = heads[column].ariaSort;
  const descending = before === "none" ? numeric : before === "ascending"; // the highest numbers first
  heads.forEach((head, i) => (head.ariaSort = i !== column ? "none" : descending ? "descending" : "ascending"));
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(a.cells[column], b.cells[column], descending ? -1 : 1));
  table.tBodies[0].append(...rows);
}

function filterTable(box, text) { // keep the rows that contain all words
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of one("tbody", box).rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => content.includes(word));
  }
}

for (const box of all(".table")) {
  const table = one("table", box);
  all("thead button", table).forEach((button, column) => button.addEventListener("click", () => sortTable(table, column)));
  const first = table.tBodies[0].rows[0];
  [...table.tHead.rows[0].cells].forEach((head, i) => head.classList.toggle("num", first.cells[i].matches(".num")));
  one("input", box)?.addEventListener("input", (event) => filterTable(box, event.target.value));
}

// --- details of a result, and pictures in full size ----------------------------------------------------------------

const dialog = one("#details");

function show(className, ...children) {
  dialog.className = className;
  one("div", dialog).replaceChildren(...children);
  dialog.showModal();
  dialog.scrollTop = 0;
}

function pairs(title, values) {
  const rows = Object.entries(values).map(([key, value]) => make("div", "", make("dt", "", key), make("dd", "", value)));
  return rows.length ? [make("h3", "", title), make("dl", "pairs", ...rows)] : [];
}

let results;
document.addEventListener("click", (event) => {
  const button = event.target.closest(".more, .zoom");
  if (button?.matches(".zoom")) show("picture", one("img", button).cloneNode());
  if (button?.matches(".more")) {
    results ??= read("results-data"); // it is long, and most readers need little of it
    const { file, values, args } = results[button.dataset.result];
    show("", make("h3", "code", file), ...pairs("Result", values), ...pairs("Arguments of the evaluation", args));
  }
  if (event.target === dialog) dialog.close(); // outside of its content
});

// --- curves --------------------------------------------------------------------------------------------------------

const curves = read("curves-data");
const chips = all(".chip");
const HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22, TIP_LINES = 10;

function ticks(low, high, count) { // round numbers within the range
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step), last = Math.floor(high / step);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function label(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(4)));
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const margin = low === high ? Math.abs(low) * 0.05 || 1 : 0;
  return [low - margin, high + margin];
}

function draw(figure) {
  const chart = curves.charts[figure.dataset.chart], plot = one(".plot", figure), width = plot.clientWidth;
  const shown = chart.curves
    .map(({ x, y }, run) => ({ x: x ?? curves.epochs[run], y, run }))
    .filter(({ y, run }) => chips[run].ariaPressed === "true" && y.some((value) => value !== null));
  figure.state = null;
  if (!shown.length) return plot.replaceChildren(make("div", "empty", "no values of the chosen runs"));
  const [x0, x1] = extent(shown.flatMap(({ x }) => x));
  let [y0, y1] = extent(shown.flatMap(({ y }) => y));
  const nearLimit = chart.line !== null && chart.line <= y1 + 0.3 * (y1 - y0) && chart.line >= y0;
  if (nearLimit) y1 = Math.max(y1, chart.line);
  const pad = 0.05 * (y1 - y0);
  y0 -= pad; y1 += pad;
  const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const Y = (y) => HEIGHT - BOTTOM - ((y - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const parts = [];
  const line = (kind, y) => `<line class="${kind}" x1="${LEFT}" x2="${width - RIGHT}" y1="${Y(y)}" y2="${Y(y)}"/>`;
  for (const y of ticks(y0, y1, 5)) {
    parts.push(line("grid", y));
    parts.push(`<text x="${LEFT - 6}" y="${Y(y) + 4}" text-anchor="end">${label(y)}</text>`);
  }
  for (const x of ticks(x0, x1, Math.max(2, Math.min(8, width / 70))).filter((x) => Number.isInteger(x))) {
    parts.push(`<text x="${X(x)}" y="${HEIGHT - 6}" text-anchor="middle">${label(x)}</text>`);
  }
  if (nearLimit) parts.push(line("limit", chart.line));
  for (const { x, y, run } of shown) {
    let path = "", dots = "";
    y.forEach((value, i) => {
      if (value === null) return;
      const start = i === 0 || y[i - 1] === null, alone = start && (i === y.length - 1 || y[i + 1] === null);
      path += `${start ? "M" : "L"}${X(x[i]).toFixed(1)} ${Y(value).toFixed(1)}`;
      if (alone) dots += `<circle cx="${X(x[i])}" cy="${Y(value)}" r="3"/>`;
    });
    parts.push(`<g class="c${run % 8}"><path class="curve d${Math.floor(run / 8) % 3}" d="${path}"/>${dots}</g>`);
  }
  // As HTML, since there are only numbers in it.
  plot.innerHTML = `<svg width="${width}" height="${HEIGHT}" role="img">${parts.join("")}<g class="pointer"></g></svg>`;
  one("svg", plot).setAttribute("aria-label", one("figcaption", figure).textContent);
  figure.state = { shown, X, Y, width };
}

function point(figure, clientX) { // show the values at the epoch nearest to the pointer
  if (!figure.state) return;
  const { shown, X, Y, width } = figure.state, plot = one(".plot", figure);
  const at = clientX - plot.getBoundingClientRect().left;
  const distance = (epoch) => Math.abs(X(epoch) - at);
  const epoch = shown.flatMap(({ x }) => x).reduce((best, other) => (distance(other) < distance(best) ? other : best));
  const values = shown
    .map(({ x, y, run }) => ({ run, value: y[x.indexOf(epoch)] ?? null }))
    .filter(({ value }) => value !== null)
    .sort((a, b) => b.value - a.value);
  const dot = ({ run, value }) => `<circle class="c${run % 8}" cx="${X(epoch)}" cy="${Y(value)}" r="3.5"/>`;
  const line = `<line class="cursor" x1="${X(epoch)}" x2="${X(epoch)}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/>`;
  one(".pointer", plot).innerHTML = line + values.map(dot).join("");
  const lines = values.slice(0, TIP_LINES).map(({ run, value }) => {
    const swatch = one(".swatch", chips[run]).cloneNode();
    return make("div", "", swatch, make("span", "", curves.labels[run]), make("b", "", label(value)));
  });
  if (values.length > TIP_LINES) lines.push(make("div", "", `and ${values.length - TIP_LINES} more`));
  const tip = make("div", "tip", make("small", "", `epoch ${epoch}`), ...lines);
  one(".tip", plot)?.remove();
  plot.append(tip);
  const right = X(epoch) < width / 2, distanceToEdge = 12 + (right ? X(epoch) : width - X(epoch));
  tip.style[right ? "left" : "right"] = `${Math.min(distanceToEdge, width - tip.offsetWidth)}px`;
}

function leave(figure) {
  one(".tip", figure)?.remove();
  one(".pointer", figure)?.replaceChildren();
}

if (curves) {
  const visible = new Set();
  const drawAll = () => visible.forEach(draw);
  const observer = new IntersectionObserver((entries) => { // draw what comes into view
    for (const { target, isIntersecting } of entries) {
      visible[isIntersecting ? "add" : "delete"](target);
      if (isIntersecting) draw(target);
    }
  }, { rootMargin: "300px" });
  for (const figure of all(".chart")) {
    observer.observe(figure);
    figure.addEventListener("pointermove", (event) => point(figure, event.clientX));
    figure.addEventListener("pointerdown", (event) => point(figure, event.clientX));
    figure.addEventListener("pointerleave", () => leave(figure));
  }
  const press = (chosen, pressed) => {
    for (const chip of chosen) chip.ariaPressed = String(pressed);
    drawAll();
  };
  for (const chip of chips) chip.addEventListener("click", () => press([chip], chip.ariaPressed !== "true"));
  for (const button of all("[data-all]")) button.addEventListener("click", () => press(chips, button.dataset.all === "all"));
  addEventListener("resize", drawAll);
}
