// What the page draws: numbers, tables and charts of rows.
const CHARTS = JSON.parse(document.getElementById("charts").textContent);
const DATA = JSON.parse(document.getElementById("data").textContent);
const CROSSOVER = 1.15;
const $ = id => document.getElementById(id);

// What was measured in a series is unpacked when it is looked at first.
async function unpack(one) {
  if (!one.packed) return;
  const bytes = Uint8Array.from(atob(one.packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  Object.assign(one, await new Response(stream).json(), { packed: "" });
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  Object.assign(made, attributes);
  return made;
}
const unique = values => [...new Set(values)];
const numbers = values => unique(values).sort((a, b) => a - b);
const ratio = value => value.toFixed(2);
// Three digits, and no power of ten.
const digits = value => value >= 100 ? value.toFixed(0) : value.toPrecision(3);
const interval = (row, show) => row.low === null ? "" : `[${show(row.low)}, ${show(row.high)}]`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
// A value over another: infinite over nothing, and 1 where both are nothing.
const over = (value, base) => base > 0 ? Math.max(value, 0) / base : value > 0 ? Infinity : 1;
const percent = change => change === Infinity ? "+∞%"
  : `${change < 1 ? "−" : "+"}${Math.abs(100 * (change - 1)).toFixed(0)}%`;

const WHY = {
  "not asked": "no run asked for it",
  "n/a": "no run asked for it, or it is older than the recording of reasons",
  "lacks": "the commit or the device lacks it",
  "too slow": "this machine is too slow for it",
  "too large": "it needs more memory than this machine has",
  "failed": "it was asked for and broke",
};
const WHY_HOST_BOUND = "the calling thread computes for more than 90% of this time: the processor bounds it";
const why = rows => unique(rows.map(row => row.state)).map(state => WHY[state] ?? state).join("; ") || WHY["not asked"];

// The cells of a machine: a benchmark at a batch, context and block size, over its commits.
function cellsOf(one) {
  one.flat ??= one.benchmarks.filter(b => b.measure !== "facts").flatMap(benchmark =>
    benchmark.cells.map(([batch, context, block], i) => ({
      benchmark, batch, context, block, measure: benchmark.measure, path: benchmark.path,
      bytes: benchmark.bytes?.[i], threshold: benchmark.thresholds?.[i], values: benchmark.values[i], host: benchmark.host?.[i],
    })));
  return one.flat;
}

// A value as a row: its state and numbers.
function read(said) {
  if (!Array.isArray(said)) return { state: said ?? "not asked", value: null, low: null, high: null };
  const [value, low = null, high = null] = said;
  return { state: "ok", value, low, high };
}
const at = (cell, commit) => ({ ...cell, commit, ...read(cell.values[commit]), hostBound: cell.host?.[commit] });
const known = row => row.state === "ok";
// Whether a row says something: a number, that it failed, or why it cannot be measured here.
const told = row => !["n/a", "not asked"].includes(row.state);

// One of asv's pages, of this machine and environment and some parameters of a benchmark.
function asvPage(name, params = {}) {
  const state = Object.entries({ ...series().asv, ...params });
  return `index.html#${name}?${state.map(pair => pair.map(encodeURIComponent).join("=")).join("&")}`;
}

// Where asv's pages show one series alone.
function linkOf({ benchmark, sizes, batch, context, block }) {
  sizes ??= [batch, context, block];
  const named = benchmark.params.map((name, i) => [`p-${name}`, sizes[i]]).filter((_, i) => benchmark.params[i]);
  return asvPage(benchmark.name, Object.fromEntries(named));
}

function numberCell(row, show, share = () => "") {
  const cell = element("td");
  if (!row) return cell;
  if (!known(row)) return Object.assign(cell, { textContent: row.state, title: WHY[row.state] ?? "",
                                               className: row.state === "failed" ? "bad" : "na" });
  cell.append(element("a", show(row.value), { href: linkOf(row) }), share(row.value), " ", element("small", interval(row, show)));
  if (row.hostBound) cell.append(" ", element("small", "host-bound", { title: WHY_HOST_BOUND, className: "na" }));
  return cell;
}

// A table of rows: `down` and `across` are {title, values, of, text}, `chosen` the line that is marked.
function pivot(id, rows, down, across, show, { chosen, share } = {}) {
  const found = new Map(rows.map(row => [`${down.of(row)} ${across.of(row)}`, row]));
  const head = element("tr");
  head.append(element("th", down.title), ...across.values.map(value => element("th", across.text(value))));
  $(id).replaceChildren(head, ...down.values.map(value => {
    const line = element("tr", undefined, { className: value === chosen ? "chosen" : "" });
    line.append(element("th", down.text(value), { scope: "row" }),
                ...across.values.map(column => numberCell(found.get(`${value} ${column}`), show, share)));
    return line;
  }));
}

// Draws the rows that make lines, a line for each value of `by`, and says what was left out. An axis of
// factors has no place for 0, nor for an interval that reaches it.
function draw(chart, rows, id, by) {
  const lines = Object.values(Object.groupBy(rows.filter(row => known(row) && row.value > 0), row => row[by]));
  const drawn = lines.filter(line => line.length > 1).flat();
  const lone = lines.filter(line => line.length === 1).map(([row]) => by === "context"
    ? `${row.context} tokens (${ratio(row.value)} at ${row.label})` : `${row.path} (${ratio(row.value)} at ${row.context} tokens)`);
  say(`${id}-lone`, lone.length ? `Measured once and so no line: ${lone.join(", ")}.` : "");
  $(id).hidden = !drawn.length;
  if (!drawn.length) return $(id).replaceChildren();
  const spec = structuredClone(CHARTS[chart]);
  const shown = numbers(drawn.map(row => row[by]));
  if (by === "path") shown.sort();
  for (const { encoding: { color } } of spec.layer)
    if (color) color.scale = { domain: shown, range: shown.map(value => DATA.colours[value]) };
  const ends = row => row.low > 0 ? {} : { low: null, high: null };
  const plain = drawn.map(({ benchmark, values, host, ...row }) => ({ ...row, ...ends(row), link: linkOf({ benchmark, ...row }) }));
  return vegaEmbed($(id), { ...spec, datasets: { rows: plain } }, {
    renderer: "svg", actions: { export: true, source: false, compiled: false, editor: false },
  });
}

function say(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// "0.41–0.54", or the number if there is one.
function rangeOf(rows) {
  const values = rows.map(row => row.value);
  const [least, most] = [Math.min(...values), Math.max(...values)].map(ratio);
  return least === most ? least : `${least}–${most}`;
}
