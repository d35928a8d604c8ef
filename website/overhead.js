// The URL records what the reader chose, so a view can be shared, and the back button works.
const CHOICES = ["machine", "commit", "batch", "block", "against"];
const NEWEST = 30; // commits that are shown besides the phases
const MEASURES = {
  first: { title: "First token", larger: true, of: "mlx-lm's speed",
    what: "Speed from a prompt to its first token, nothing cached, over mlx-lm's own cache. Above 1 the paged store is faster." },
  tokens: { title: "Tokens per second", larger: true, of: "mlx-lm's speed",
    what: "A model of Llama-3.2-1B's shape (a small one on a CPU) decodes in mlx-lm's BatchGenerator. Above 1 the paged store is faster." },
  memory: { title: "Peak memory", of: "mlx-lm's memory",
    what: "Peak memory over mlx-lm's, of a prompt to its first token (weights included) or of a mix of requests. Below 1 the paged store takes less." },
  step: { title: "Decode step", of: "mlx-lm's time",
    what: "The time of a decode step without the rest of the model, over the same with mlx-lm's contiguous cache (step overhead). Below 1 the paged cache is faster." },
  bound: { title: "Step over contiguous attention alone", of: "the time of contiguous attention alone",
    what: "The same paged step over contiguous attention that writes nothing, the least that a step with MLX's own attention can cost. Below 1 the paged cache is faster." },
  attention: { title: "Attention alone", of: "MLX's time",
    what: "The time of attention over blocks, over MLX's own over contiguous K and V (gather overhead). Below 1 the paged cache is faster." },
};
const CARDS = ["first", "tokens", "memory", "step", "attention"];
const WHY = {
  "not asked": "no run requested it",
  "n/a": "no run requested it, or the result is older than the recording of reasons",
  "lacks": "the commit or the device lacks the feature",
  "too slow": "this machine is too slow for it",
  "too large": "it needs more memory than this machine has",
  "failed": "it was requested and broke",
};
const CHARTS = JSON.parse(document.getElementById("charts").textContent);
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
let chosen = {}, series, shows = 0;

function element(tag, content = [], attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  return made.append(...[content].flat()), made;
}
function say(id, ...content) {
  $(id).replaceChildren(...content);
  $(id).hidden = !content.some(Boolean);
}
const unique = values => [...new Set(values)];
const numbers = values => unique(values).sort((a, b) => String(a).localeCompare(b, "en", { numeric: true }));
const short = hash => hash.slice(0, 8);
const tokens = context => context ? `${context} tokens` : "mixed requests";
const date = at => at ? new Date(at).toISOString().slice(0, 10) : "";
const digits = x => x === Infinity ? "∞" : x >= 100 ? x.toFixed(0) : x.toFixed(2);
const named = one => one.machine + (DATA.series.filter(x => x.machine === one.machine).length > 1 ? ` (${one.environment})` : "");
const over = (value, base) => base > 0 ? Math.max(value, 0) / base : value > 0 ? Infinity : 1;
const numberOf = hash => series.commits.findIndex(commit => short(commit.hash) === hash);
const alone = measure => measure === "first" || measure === "memory"; // a prompt is no batch
const inBlocks = measure => !alone(measure) && measure !== "tokens"; // models have one size
const direction = (measure, low, high) => high < 1 || low > 1 ? (low > 1) === !!MEASURES[measure].larger ? "good" : "bad" : "";

// What was measured in a series is unpacked when it is looked at first.
async function unpack(one) {
  if (one.flat) return;
  const bytes = Uint8Array.from(atob(one.packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  Object.assign(one, await new Response(stream).json());
  one.flat = one.measures.flatMap(of => of.cells.map(([batch, context, block], i) => ({
    of, batch, context, block, measure: of.measure, path: of.path, asked: of.asked[i], bytes: of.bytes?.[i],
    threshold: of.thresholds[i], values: of.values[i], host: of.host[i] })));
}

// A cell at a commit as a row: its state and numbers.
function at(cell, commit) {
  const said = cell.values[commit];
  const [value, low = null, high = null] = Array.isArray(said) ? said : [null];
  return { ...cell, commit, value, low, high, state: value === null ? said ?? "not asked" : "ok" };
}
const known = row => row.state === "ok";
const has = commit => cell => Array.isArray(cell.values[commit]);
const interval = (row, show = digits) => row.low === null ? "" : `[${show(row.low)}, ${show(row.high)}]`;

// The cells of a measure in the chosen block size and batch, or in those that it was measured in.
function cellsOf(measure, { anyBatch, anyPath } = {}) {
  const all = series.flat.filter(cell => cell.measure === measure && (anyPath || cell.path === "auto"));
  const pick = (found, key, wanted) => {
    const there = numbers(found.filter(cell => cell.values.some(Array.isArray)).map(cell => cell[key]));
    return found.filter(cell => cell[key] === (there.includes(wanted) ? wanted : there[0] ?? found[0]?.[key]));
  };
  const sized = pick(all, "block", +chosen.block);
  return anyBatch ? sized : pick(sized, "batch", +chosen.batch);
}

function asvPage(name, params = {}) {
  return `index.html#${name}?` + Object.entries({ ...series.asv, ...params }).map(pair => pair.map(encodeURIComponent).join("=")).join("&");
}
const linkOf = row => asvPage(row.of.name, Object.fromEntries(row.of.params.map((name, i) => [`p-${name}`, row.asked[i]])));
const commitLink = commit => !DATA.repository ? commit.label
  : element("a", commit.label, { href: `${DATA.repository}/commit/${commit.hash}`, title: commit.subject });

function numberCell(row, show = digits) {
  if (!row) return element("td");
  if (!known(row)) return element("td", row.state, { title: WHY[row.state] ?? "", className: row.state === "failed" ? "bad" : "na" });
  const host = row.host?.[row.commit] ? [" ", element("small", "host-bound", { className: "na" })] : [];
  const speed = row.bytes ? ` ${digits(row.bytes / 1e9 / row.value)} GB/s` : "";
  return element("td", [element("a", show(row.value), { href: linkOf(row) }), " ", element("small", interval(row, show)), speed, ...host]);
}
function fill(id, head, lines) {
  $(id).hidden = !lines.length;
  $(id).replaceChildren(element("tr", head.map(text => element("th", text))), ...lines.map(([name, ...cells]) =>
    element("tr", [element("th", name, { scope: "row" }), ...cells.map(cell => cell instanceof Node ? cell : element("td", cell))])));
}
function pivot(id, rows, title, down, across, text = String, show) {
  const columns = numbers(rows.map(row => row[across]));
  const cell = (line, column) => numberCell(rows.find(row => row[down] === line && row[across] === column), show);
  fill(id, [title, ...columns.map(text)], numbers(rows.map(row => row[down])).map(line => [String(line), ...columns.map(column => cell(line, column))]));
}

// How far a series moves between runs of identical code.
const moves = ({ threshold: [factor, words] }) => element("abbr", `±${(100 * (factor - 1)).toFixed(0)}%${words.endsWith("guess") ? "?" : ""}`,
  { title: words.endsWith("guess") ? `${words}: no runs of identical code are recorded on this machine` : `${words}, between runs of identical code`, tabIndex: 0 });

// A change of some cells from one commit to another: the geometric mean, and what it is called.
function changeOf(cells, before, after) {
  const pairs = cells.filter(cell => has(before)(cell) && has(after)(cell)).map(cell => [at(cell, before), at(cell, after)])
    .filter(pair => cells.length === 1 || pair.every(row => row.value > 0));
  if (!pairs.length) return null;
  const mean = values => Math.exp(values.reduce((sum, x) => sum + Math.log(x), 0) / values.length);
  const judged = pairs.every(pair => pair.every(row => row.low !== null));
  const factor = mean(pairs.map(([was, is]) => over(is.value, was.value)));
  const [low, high] = judged ? [mean(pairs.map(([was, is]) => over(is.low, was.high))), mean(pairs.map(([was, is]) => over(is.high, was.low)))] : [null, null];
  const threshold = Math.max(...pairs.map(([was]) => was.threshold[0]));
  const moved = judged && (low > 1 || high < 1) && Math.max(factor, 1 / factor) > threshold;
  const word = !judged ? "not judged" : !moved ? "unchanged" : factor > 1 === !!MEASURES[cells[0].measure].larger ? "improved" : "worsened";
  return { factor, low, high, word, className: { improved: "good", worsened: "bad" }[word] ?? "na" };
}
const changeCell = change => !change ? element("td")
  : element("td", [`× ${digits(change.factor)} `, element("small", interval(change))], { className: change.className, title: change.word });

// Draws lines. An axis of factors has no place for 0, nor for an interval that reaches it.
function draw(kind, rows, along) {
  const drawn = rows.filter(row => known(row) && row.value > 0);
  $(kind).hidden = unique(drawn.map(row => row[along])).length < 2;
  if ($(kind).hidden) return $(kind).replaceChildren();
  const plain = drawn.map(({ of, values, host, low, high, ...row }) => ({ ...row, ...(low > 0 ? { low, high } : {}),
    shown: digits(row.value) + " " + interval({ low, high }), link: linkOf({ of, ...row }) }));
  return vegaEmbed($(kind), { ...CHARTS[kind], datasets: { rows: plain } }, { renderer: "svg", actions: false });
}

// "half mlx-lm's time", "1.35–1.38 times mlx-lm's speed".
function inWords(measure, rows) {
  const { of, larger } = MEASURES[measure];
  const ends = [Math.min, Math.max].map(end => end(...rows.map(row => row.value)));
  if (ends.every(x => digits(x) === "1.00")) return `equal to ${of}`;
  if (!larger && ends.every(x => x > .475 && x < .525)) return `half ${of}`;
  if (!larger && ends[1] < 1) return `${unique(ends.map(x => (100 * x).toFixed(0))).join("–")}% of ${of}`;
  return `${unique(ends.map(digits)).join("–")} times ${of}`;
}

function showCard(measure, number) {
  const card = element("button", element("span", MEASURES[measure].title, { className: "soft" }),
    { type: "button", id: `${measure}-card`, onclick: () => { location.hash = address({ measure }); } });
  card.ariaPressed = String(chosen.measure === measure);
  const all = cellsOf(measure, { anyBatch: true });
  const commits = [number, ...series.commits.map((_, i) => i).reverse()];
  const newest = commits.find(commit => all.some(has(commit)));
  if (newest === undefined) {
    const why = unique(all.map(cell => cell.values[number] ?? "not asked"));
    card.append(element("b", "not measured", { className: "na" }), element("small", why.map(word => WHY[word] ?? word).join("; ") || WHY["not asked"]));
    return card;
  }
  const there = all.filter(has(newest)).map(cell => at(cell, newest)), batches = numbers(there.map(row => row.batch));
  const batch = batches.includes(+chosen.batch) ? +chosen.batch : batches[0];
  const rows = there.filter(row => row.batch === batch), { label, at: when } = series.commits[newest];
  const contexts = numbers(rows.map(row => row.context).filter(Boolean)), sizes = tokens(unique([contexts[0], contexts.at(-1)]).join("–"));
  const ends = rows.map(row => direction(measure, row.low ?? row.value, row.high ?? row.value));
  const old = newest !== number || (batch !== +chosen.batch && !alone(measure));
  if (old) card.classList.add("old");
  card.append(element("b", inWords(measure, rows), { className: unique(ends).length === 1 && !old ? ends[0] : "" }),
    element("small", `${alone(measure) ? "" : `batch ${batch}, `}${sizes}`),
    element("small", `${label}, ${date(when)}`, { className: "soft" }));
  return card;
}

// The commits that are shown of those with a number in some cells, oldest first.
function spanOf(cells) {
  const there = series.commits.map((_, i) => i).filter(i => cells.some(has(i)));
  const newest = new Set([...there.slice(-NEWEST), numberOf(chosen.commit)]);
  return there.filter(i => there.length <= 2 * NEWEST || series.commits[i].phase || newest.has(i));
}

function showMeasure(measure, number) {
  const { commits } = series, { title, what } = MEASURES[measure], label = commits[number].label;
  const cells = cellsOf(measure), span = spanOf(cells), size = inBlocks(measure) && cells.length ? `, blocks of ${cells[0].block} tokens` : "";
  const batch = alone(measure) || !cells.length ? "" : `, batch ${cells[0].batch}`;
  say("title", `${title} by phase${batch}${size}`);
  const other = measure === "step" ? "bound" : measure === "bound" ? "step" : null;
  say("what", what, " ", other ? element("a", `${MEASURES[other].title}.`, { href: address({ measure: other }) }) : "");
  const contexts = numbers(cells.filter(cell => span.some(i => has(i)(cell))).map(cell => cell.context));
  const of = context => cells.find(cell => cell.context === context);
  const rows = contexts.flatMap(context => span.map(i => ({ ...at(of(context), i), label: commits[i].label }))).sort((a, b) => a.commit - b.commit);
  fill("phases-table", ["commit", "what it changed", ...contexts.map(context => element("span", [`${tokens(context)} `, moves(of(context))])), "measured"],
    span.map((i, place) => [commitLink(commits[i]), changeCell(place ? changeOf(cells, span[place - 1], i) : null),
      ...contexts.map(context => numberCell(at(of(context), i))), date(commits[i].at)]).reverse());
  const measured = commits.filter((_, i) => cells.some(has(i))).length;
  say("phases-note", span.length < measured ? `${span.length} of ${measured} commits: the phases and the newest. asv's graphs have all.` : "");

  const now = cellsOf(measure, { anyBatch: true }).filter(cell => cell.values.some(Array.isArray)).map(cell => at(cell, number));
  const any = now.some(row => !["n/a", "not asked"].includes(row.state));
  say("now-title", `${title} at ${label}${size}` + (any ? "" : ": not measured"));
  const facts = series.facts.filter(fact => fact.of === measure).flatMap(fact => fact.what.map((what, i) =>
    ({ what, row: at({ of: fact, asked: fact.asked[i], values: fact.values[i] }, number) }))).filter(fact => known(fact.row));
  const floor = facts.filter(fact => fact.what.startsWith("mlx-lm against itself"))
    .flatMap(({ row }) => row.low === null ? [row.value] : [row.low, row.high]);
  say("proof", measure === "attention" ? "Before it is timed, each is checked to run the path it names. "
    : measure === "memory" ? "" : "The package chose the attention path; which one ran was not recorded. ",
    floor.length ? `mlx-lm against itself gave ${digits(Math.min(...floor))} to ${digits(Math.max(...floor))}.` : "");
  pivot("now", any ? now : [], "batch", "batch", "context", tokens);
  fill("facts", [`also measured at ${label}`, ""], facts.map(({ what, row }) => [what, numberCell(row)]));

  const times = cellsOf("time", { anyBatch: true, anyPath: true }).filter(has(number)).map(cell => ({ ...at(cell, number), key: `${cell.batch}, ${cell.context}` }));
  say("absolute-note", times.length ? `One attention call of one layer at ${label}, blocks of ${times[0].block} tokens, by itself, with GB/s of K and V. Compare it only within a commit.`
    : `No time was recorded at ${label}: ratios are measured in turns, and asv stores the ratio alone.`);
  pivot("absolute-table", times, "batch, tokens", "key", "path", String, value => (1000 * value).toPrecision(3));
  return draw("phases", rows, "commit");
}

function showComparison(number) {
  const { commits } = series, other = numberOf(chosen.against);
  $("comparison").hidden = other < 0;
  if (other < 0) return;
  const rows = Object.keys(MEASURES).flatMap(measure => series.flat.filter(cell => cell.measure === measure && has(number)(cell) && has(other)(cell)))
    .map(cell => ({ cell, was: at(cell, other), is: at(cell, number), change: changeOf([cell], other, number) }));
  const count = word => rows.filter(row => row.change.word === word).length;
  say("compare-title", `${commits[other].label} → ${commits[number].label}: ` + (rows.length ? ["improved", "worsened", "unchanged", "not judged"]
    .filter(count).map(word => `${count(word)} ${word}`).join(", ") + "." : "no cell has a number at both."));
  const [was, is] = [other, number].map(i => commits[i].with);
  const differs = Object.keys(is).filter(key => was[key] !== is[key]).map(key => `${key} ${was[key] ?? "not recorded"} → ${is[key] ?? "not recorded"}`);
  say("compare-with", differs.length ? `The environments differ: ${differs.join("; ")}.` : "The same environment: ",
    differs.length ? "" : Object.entries(is).map(([key, value]) => `${key} ${value ?? "not recorded"}`).join(", ") + ".");
  const size = row => [["worsened", "improved"].includes(row.change.word), Math.abs(Math.log(row.change.factor))];
  rows.sort((a, b) => size(b)[0] - size(a)[0] || size(b)[1] - size(a)[1]);
  fill("compare", ["cell", commits[other].label, commits[number].label, "change", "threshold"], rows.map(({ cell, was, is, change }) => [
    `${MEASURES[cell.measure].title}: batch ${cell.batch}, ${tokens(cell.context)}` +
      (inBlocks(cell.measure) ? `, blocks of ${cell.block}` : "") + (cell.path === "auto" ? "" : `, ${cell.path}`),
    numberCell(was), numberCell(is), changeCell(change), element("td", moves(cell))]));
}

function showPaths(number) {
  const rows = cellsOf("attention", { anyPath: true }).map(cell => at(cell, number)).filter(known)
    .sort((a, b) => a.path.localeCompare(b.path) || a.context - b.context);
  $("paths").hidden = !rows.length;
  if (!rows.length) return;
  say("paths-note", `At ${series.commits[number].label}, batch ${rows[0].batch}, blocks of ${rows[0].block} tokens. Before it is timed, each is checked to run the path it names.`);
  pivot("contexts-table", rows, "tokens", "context", "path");
  return draw("contexts", rows, "context");
}

// The regressions of the chosen machine by the commit that caused them.
function showRegressions() {
  const { machine, retired } = series, found = retired ? [] : DATA.regressions.filter(cell => cell.machine === machine);
  const causes = Object.values(Object.groupBy(found, cell => `${cell.to} ${cell.accepted?.reason}`));
  $("regressions").replaceChildren(element("p", retired ? `${machine} is retired, so none are reported: ${retired}`
    : found.length ? `On ${machine}, by the commit that caused them. Accepted ones raise no alarm.` : `None on ${machine} among series with recorded noise.`),
  ...causes.map(cells => {
    cells.sort((a, b) => b.factor - a.factor);
    const [{ from, to, commit, subject, accepted, factor, name }] = cells, range = `${short(from)} ${short(to)}`;
    const why = accepted ? [" Accepted: ", element("a", accepted.reason, { href: accepted.link.replace(/^(docs\/.*)\.md$/, "docs/$1.html") })] : [];
    const diff = DATA.repository ? [element("a", "diff", { href: `${DATA.repository}/compare/${from}...${to}` }), " "] : [];
    return element("details", [element("summary", [`${commit}: ${subject}. ${cells.length} cell${cells.length > 1 ? "s" : ""}, worst ${digits(factor)} × (${name}).`, ...why]),
      element("p", [...diff, element("a", "compare", { href: address({ commit: short(to), against: short(from) }) }), " ", element("code", `git diff ${range} -- pagedkv`)]),
      ...cells.map(cell => element("div", `${digits(cell.factor)} × ${cell.name}`))]);
  }));
}

// Fills a menu. What the address asks for and is not there is replaced, and said.
function offer(name, values, preferred, label, refused) {
  const asked = chosen[name];
  if (!values.map(String).includes(asked)) {
    chosen[name] = String(preferred ?? values[0] ?? "");
    if (asked && refused) refused.push(`No ${name} ${asked} here; showing ${chosen[name]}.`);
  }
  $(name).replaceChildren(...values.map(value => element("option", label?.(value) ?? String(value), { value, selected: String(value) === chosen[name] })));
  $(name).parentElement.hidden = !values.length;
}

const address = changes => "#" + new URLSearchParams({ ...chosen, ...changes });

async function show() {
  const turn = ++shows, refused = [];
  const retired = name => DATA.series.find(one => named(one) === name).retired;
  offer("machine", DATA.series.map(named), null, name => name + (retired(name) ? " (retired)" : ""), refused);
  series = DATA.series.find(one => named(one) === chosen.machine);
  await unpack(series);
  if (turn !== shows) return;
  const { commits, flat } = series, headline = flat.filter(cell => cell.measure !== "time");
  const text = hash => { const commit = commits[numberOf(hash)]; return `${commit.label}, ${date(commit.at)}`; };
  const newest = commits.findLastIndex((_, i) => (headline.length ? headline : flat).some(has(i)));
  const hashes = commits.map(commit => short(commit.hash)).reverse();
  offer("commit", hashes, short(commits[newest].hash), text, refused);
  const number = numberOf(chosen.commit), there = headline.filter(has(number));
  const before = commits.findLastIndex((_, i) => i < number && there.some(has(i)));
  const others = hashes.filter(hash => hash !== chosen.commit);
  offer("against", others, before < 0 ? others[0] : short(commits[before].hash), text);
  offer("batch", numbers(headline.map(cell => cell.batch)), null, null, refused);
  const blocks = numbers(headline.map(cell => cell.block));
  offer("block", blocks, blocks.includes(32) ? 32 : null, null, refused);
  if (!MEASURES[chosen.measure]) chosen.measure = cellsOf("step").length ? "step" : "attention";
  say("notice", refused.join(" "));
  history.replaceState(null, "", address({}));

  const last = Math.max(...commits.map(commit => commit.at)), days = Math.floor((Date.now() - last) / 864e5);
  const versions = Object.entries(commits[number].with).filter(([key, value]) => value && !["CPU", "system"].includes(key));
  say("about", `${commits[number].label}: ${commits[number].subject}. ${series.about}; ${versions.map(pair => pair.join(" ")).join(", ")}. Last run: ${date(last)}${days > 0 ? `, ${days} day${days > 1 ? "s" : ""} ago` : ""}.` + (series === DATA.series[0] ? ` The page opens on ${DATA.opens}.` : "") + (series.retired ? ` Retired: ${series.retired}` : ""));
  say("asv", element("a", "Documentation", { href: "docs/index.html" }), ...location.protocol === "file:"
    ? [element("small", " Numbers lead to asv's pages, which need a server: make serve.", { className: "soft" })]
    : [element("a", "All benchmarks", { href: "index.html#/" }), element("a", "List", { href: asvPage("/summarylist") })]);
  $("cards").replaceChildren(...CARDS.map(measure => showCard(measure, number)));
  const drawn = [showMeasure(chosen.measure, number), showPaths(number)];
  showComparison(number);
  showRegressions();
  await Promise.all(drawn);
  if (turn === shows) document.body.dataset.shown = Object.values(chosen).join("\n");
}

const follow = () => { chosen = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); show(); };
for (const name of CHOICES) $(name).addEventListener("change", event => { location.hash = address({ [name]: event.target.value }); });
addEventListener("hashchange", follow);
$("to-words").onclick = event => { event.preventDefault(); $("words").scrollIntoView(); $("words").focus(); };
say("opens", DATA.opens);
$("reasons").append(...Object.entries(WHY).flatMap(([word, text]) => [element("dt", word), element("dd", text)]));
if (DATA.series.length) follow();
else { $("choices").hidden = true; say("notice", "Nothing has been measured yet: make bench."); }
