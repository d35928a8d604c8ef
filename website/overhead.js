// What the page says, from top to bottom.
function showCard(measure, number) {
  const made = element("div", undefined, { className: "card", id: `${measure}-card` });
  made.append(element("span", title(measure), { className: "soft" }));
  const { commits } = series();
  const found = cells(measure, onPath);
  const here = found.filter(cell => inBatch(cell) && inBlock(cell));
  const rows = here.map(cell => at(cell, number));
  const now = rows.filter(known);
  const words = text => made.append(element("small", text));
  if (!now.length) {
    const where = `batch ${chosen.batch}${ofModels(measure) ? "" : `, blocks of ${chosen.block}`}`;
    words(found.length ? `Not measured at ${where}: ${why(rows)}.` : notMeasured(measure));
    const elsewhere = numbers(found.filter(cell => inBlock(cell) && hasNumber(number)(cell)).map(cell => cell.batch));
    if (elsewhere.length) words("It was at batch ");
    elsewhere.forEach((batch, i) => made.lastChild.append(...i ? [", "] : [], button(batch, { batch })));
    return made;
  }
  made.append(element("b", rangeOf(now)));
  const label = commits[number].short;
  words(now.length === 1 ? `${interval(now[0], ratio)} at ${now[0].context} tokens, ${label}`
    : `range over ${now.length} context lengths, ${label}`);
  const contexts = new Set(now.map(row => row.context));
  const same = here.filter(cell => contexts.has(cell.context));
  const oldest = commits.findIndex((_, earlier) => earlier < number && same.some(hasNumber(earlier)));
  if (oldest >= 0) {
    const old = same.map(cell => at(cell, oldest)).filter(known);
    const common = now.filter(row => old.some(was => was.context === row.context));
    words(`${rangeOf(old)} at ${commits[oldest].short} → ${rangeOf(common)} now`);
  } else words("no earlier commit was measured here");
  const everywhere = found.map(cell => at(cell, number)).filter(known);
  const worst = everywhere.reduce((a, b) => (b.value > a.value) === !larger(measure) ? b : a);
  made.append(button(`worst cell ${ratio(worst.value)}: batch ${worst.batch}, ${worst.context} tokens` +
    (ofModels(measure) ? "" : `, blocks of ${worst.block}`),
    { batch: worst.batch, ...(ofModels(measure) ? {} : { block: worst.block }) }, () => pick(measure, worst)));
  return made;
}

// Marks a cell in the table of a measure and goes to it.
function pick(measure, { batch, context }) {
  const table = $(`${measure}-now`), heads = [...table.rows[0].cells];
  const column = heads.findIndex(cell => cell.textContent === `${context} tokens`);
  const line = [...table.rows].find(row => row.cells[0].textContent === String(batch));
  line.cells[column].classList.add("picked");
  line.cells[column].scrollIntoView({ block: "center" });
  line.cells[column].querySelector("a").focus({ preventScroll: true });
}

function notMeasured(measure) {
  const states = series().unmeasured[measure] ?? [];
  return `Not measured on this machine: ${why(states.map(state => ({ state })))}.`;
}

// A measure at the chosen commit by batch and context, and at the chosen batch over commits.
function showMeasure(measure, number) {
  const { commits, benchmarks } = series();
  const label = commits[number].label;
  const part = id => $(`${measure}-${id}`);
  const found = cells(measure, onPath), inBlocks = found.filter(inBlock);
  const where = (ofModels(measure) ? "" : `blocks of ${chosen.block} tokens`) +
    (measure === "attention" ? `, path ${chosen.path}` : "");
  const here = `At ${label}${where && ", " + where}`;
  const context = rows => ({ title: "", values: numbers(rows.map(row => row.context)),
                             of: row => row.context, text: value => `${value} tokens` });

  const now = inBlocks.map(cell => at(cell, number));
  const any = now.some(told);
  say(`${measure}-now-title`, !found.length ? notMeasured(measure) : any ? here : `${here}: not measured, ${why(now)}. `);
  const latest = commits.findLastIndex((_, other) => inBlocks.some(hasNumber(other)));
  if (found.length && !any && latest >= 0)
    part("now-title").append(button(`It was at ${commits[latest].short}.`, { commit: short(commits[latest].hash) }));
  part("now").hidden = !any;
  const batches = { title: "batch", values: numbers(now.map(row => row.batch)), of: row => row.batch, text: String };
  pivot(`${measure}-now`, now, batches, context(now), ratio, { chosen: measure === "first" ? 1 : +chosen.batch });

  const ofBatch = inBlocks.filter(inBatch), span = spanOf(ofBatch);
  const rows = ofBatch.flatMap(cell => span.map(commit => ({ ...at(cell, commit), label: commits[commit].short })));
  rows.sort((a, b) => a.commit - b.commit || a.context - b.context);
  const over = `Over commits, batch ${measure === "first" ? 1 : chosen.batch}${where && ", " + where}`;
  const measured = commits.filter((_, other) => ofBatch.some(hasNumber(other))).length;
  say(`${measure}-phases-title`, !inBlocks.length ? ""
    : !span.length ? `${over}: not measured, ${why(ofBatch.map(cell => at(cell, number)))}.`
    : span.length === 1 ? `${over}: measured at ${commits[span[0]].label} alone.`
    : span.length < measured ? `${over}: ${span.length} of ${measured} commits, newest first in the table`
    : `${over}, newest first in the table`);
  const several = span.length > 1;
  part("phases-table").hidden = !several;
  const newestFirst = { title: "commit", values: span.toReversed(), of: row => row.commit, text: c => commits[c].label };
  pivot(`${measure}-phases-table`, rows, newestFirst, context(rows), ratio, { chosen: number });
  const heads = [...part("phases-table").rows[0].cells].slice(1);
  numbers(rows.map(row => row.context)).forEach((size, i) => {
    const cell = ofBatch.find(cell => cell.context === size);
    heads[i].append(" ", element("small", moves(cell), { title: cell.threshold[1] }));
  });

  const facts = benchmarks.filter(b => b.of === measure).flatMap(benchmark =>
    benchmark.what.map((what, i) => ({ what, benchmark, sizes: benchmark.cells[i], ...read(benchmark.values[i][number]) })))
    .filter(known);
  say(`${measure}-facts-title`, facts.length ? `Besides, at ${label}` : "");
  part("facts").hidden = !facts.length;
  part("facts").replaceChildren(...facts.map(fact => {
    const line = element("tr");
    line.append(element("th", fact.what, { scope: "row" }), numberCell(fact, ratio));
    return line;
  }));
  return draw(ofModels(measure) ? measure : "phases", several ? rows : [], `${measure}-phases`, "context");
}

// What was measured of each path, at the chosen commit, batch and block size.
function showPaths(id, rows, tail, show, share) {
  rows.sort((a, b) => a.path.localeCompare(b.path) || a.context - b.context);
  const where = `At ${series().commits[numberOf(chosen.commit)].label}, batch ${chosen.batch}, blocks of ${chosen.block} tokens`;
  const any = rows.some(told);
  say(`${id}-title`, any ? where + tail : `${where}: not measured, ${why(rows)}.`);
  $(`${id}-table`).hidden = !any;
  const paths = unique(rows.filter(told).map(row => row.path));
  pivot(`${id}-table`, rows, { title: "tokens", values: numbers(rows.map(row => row.context)), of: row => row.context, text: String },
        { values: paths, of: row => row.path, text: String }, show, { share });
  return draw(id, rows, id, "path");
}

function showCrossover(rows) {
  const said = unique(rows.filter(known).map(row => row.path)).map(path => {
    const measured = rows.filter(row => row.path === path && known(row));
    const within = measured.filter(row => row.value <= CROSSOVER);
    const longest = Math.max(...within.map(row => row.context));
    return `${path}: ` + (!within.length ? "at no measured context"
      : within.length === measured.length ? `at every measured context, up to ${longest} tokens` : `up to ${longest} tokens`);
  });
  say("crossover", said.length ? `At most ${CROSSOVER} × contiguous — ${said.join("; ")}.` : "");
}

// The lines of the table by cell: texts, each with where it leads.
function linesByCell(columns, number) {
  const found = new Map();
  for (const cell of cellsOf(series())) {
    const key = [cell.batch, cell.context, cell.block].join(" ");
    found.set(key, [...found.get(key) ?? [], cell]);
  }
  const show = { ratio, ms: value => (1000 * value).toFixed(2), percent: value => (100 * (value - 1)).toFixed(0) };
  return [...found].map(([key, here]) => {
    const [batch, context, block] = key.split(" ");
    const rows = columns.map(({ benchmarks, unit }) => {
      if (unit === "fragmentation") {
        const slots = Math.ceil(context / block) * block;
        return { text: (slots ? 100 * (slots - context) / slots : 0).toFixed(1) };
      }
      const cell = here.find(cell => benchmarks.includes(cell.benchmark.name));
      const row = cell ? at(cell, number) : { state: "not asked" };
      return known(row) ? { text: show[unit](row.value), href: linkOf(row), number: true } : { text: row.state };
    });
    return [{ text: batch }, { text: context }, { text: block }, ...rows];
  }).filter(line => line.some(entry => entry.number))
    .sort((a, b) => [0, 1, 2].map(i => a[i].text - b[i].text).find(Boolean) ?? 0);
}

let order = null; // of the table: column and direction
function showTable(columns, lines) {
  const titles = ["batch", "context", "block", ...columns.map(column => column.title)];
  const key = line => parseFloat(line[order.column]?.text);
  const sorted = !order ? lines : lines.toSorted((a, b) =>
    Number.isNaN(key(a)) - Number.isNaN(key(b)) || order.sign * (key(a) - key(b)));
  const head = element("tr");
  titles.forEach((title, column) => {
    const made = element("button", title, { type: "button", title: "sort" });
    made.onclick = () => {
      order = { column, sign: order?.column === column ? -order.sign : 1 };
      showTable(columns, lines);
      $("table").rows[0].cells[column].firstChild.focus();
    };
    const cell = element("th");
    if (order?.column === column) cell.ariaSort = order.sign > 0 ? "ascending" : "descending";
    cell.append(made);
    head.append(cell);
  });
  $("table").replaceChildren(head, ...sorted.map(line => {
    const made = element("tr");
    made.append(...line.map(({ text, href }) => {
      const cell = element("td", undefined, { className: text === "failed" ? "bad" : WHY[text] ? "na" : "", title: WHY[text] ?? "" });
      cell.append(href ? element("a", text, { href }) : text);
      return cell;
    }));
    return made;
  }));
  $("csv").onclick = () => {
    const text = [titles, ...sorted.map(line => line.map(entry => entry.text))].map(texts => texts.join(",")).join("\n");
    const href = URL.createObjectURL(new Blob([text + "\n"], { type: "text/csv" }));
    element("a", "", { href, download: `${series().machine}-${chosen.commit}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  };
}

// The regressions of the chosen machine by the commit that caused them, with what changed there.
function showRegressions() {
  const { machine, retired, commits } = series();
  const of = name => DATA.regressions.map(cause => ({
    ...cause, cells: cause.cells.filter(cell => (cell.machine ?? name) === name) })).filter(cause => cause.cells.length);
  const found = retired ? [] : of(machine);
  const measured = hash => hash && commits.some(commit => commit.hash === hash);
  $("regressions").replaceChildren(
    element("p", retired ? `None is looked for on ${machine}, which is retired: ${retired}`
      : found.length ? `On ${machine}, by the commit that caused them; accepted ones raise no alarm:`
      : `None on ${machine} in series whose noise is recorded.`),
    ...found.map(cause => {
      const made = element("details");
      const between = cause.after ? `between ${cause.after} and ${cause.commit}` : cause.commit;
      const worst = cause.cells[0], accepted = cause.accepted;
      made.append(element("summary", `${between}: ${cause.subject}. ${many(cause.cells.length, "cell")}, ` +
        `worst ${ratio(worst.factor)} × (${worst.name})` + (accepted ? `. Accepted: ${accepted.reason}` : "")));
      const ways = element("p");
      if (accepted) ways.append(element("a", "why", { href: accepted.link.replace(/^(docs\/.*)\.md$/, "docs/$1.html") }), " · ");
      if (measured(cause.from) && measured(cause.to))
        ways.append(button("side by side", { commit: short(cause.to), against: short(cause.from) },
                           () => $("compare").scrollIntoView()), " · ");
      const range = cause.from ? `${short(cause.from)} ${short(cause.to)}` : `${short(cause.to)}^!`;
      if (DATA.repository)
        ways.append(element("a", "diff", { href: cause.from ? `${DATA.repository}/compare/${cause.from}...${cause.to}`
                                                            : `${DATA.repository}/commit/${cause.to}` }), " · ");
      ways.append(element("code", `git diff ${range} -- pagedkv`));
      made.append(ways, ...cause.cells.map(({ name, factor, benchmark, params }) => {
        const line = element("div", `${ratio(factor)} × `);
        const href = linkOf({ benchmark: { name: benchmark, params: Object.keys(params) }, sizes: Object.values(params) });
        line.append(element("a", name, { href }));
        return line;
      }));
      return made;
    }));
}

// asv's own pages, of this machine; from a disk they do not open.
function showNavigation() {
  const documents = element("a", "Documentation", { href: "docs/index.html" });
  if (location.protocol === "file:") return $("asv").replaceChildren(documents,
    element("span", "asv's own pages, where numbers lead, need a server: make serve.", { className: "soft" }));
  const pages = { "All benchmarks": "index.html#/", "List": asvPage("/summarylist"), "asv's regressions": "index.html#/regressions" };
  $("asv").replaceChildren(documents, ...Object.entries(pages).map(([text, href]) => element("a", text, { href })));
}

let shows = 0;
async function show() {
  const turn = ++shows, refused = [];
  offerMachines(refused);
  await unpack(series());
  if (turn !== shows) return;
  offerCells(refused);
  history.replaceState(null, "", "#" + new URLSearchParams(CHOICES.map(name => [name, chosen[name]])));
  const { about, environment, retired, commits, copy } = series();
  const number = numberOf(chosen.commit);
  say("about", `${about}; environment ${environment}` + (retired ? `. Retired: ${retired}` : ""));
  say("printed", `${chosen.machine}, ${commits[number].label}, batch ${chosen.batch}, blocks of ${chosen.block} tokens, ` +
    `attention path ${chosen.path}`);
  showNavigation();
  $("headline").replaceChildren(...MEASURES.map(measure => showCard(measure, number)));
  const drawn = MEASURES.map(measure => showMeasure(measure, number));
  showComparison(number);

  const rows = measure => cells(measure, inBatch, cell => cell.block === +chosen.block).map(cell => at(cell, number));
  const paths = rows("attention");
  drawn.push(showPaths("contexts", paths, "", ratio));
  showCrossover(paths);
  const measured = ({ benchmarks, unit }) => unit === "fragmentation" ||
    cellsOf(series()).some(cell => benchmarks.includes(cell.benchmark.name) && hasNumber(number)(cell));
  const columns = DATA.columns[chosen.columns].filter(measured);
  const lines = linesByCell(columns, number);
  const without = DATA.columns[chosen.columns].filter(column => !measured(column)).map(column => column.title).join(", ");
  say("table-title", (lines.length ? `At ${commits[number].label}, all cells. ` : "") +
    (without && `Not measured at ${commits[number].label}: ${without}.`));
  $("table").hidden = $("csv").hidden = !lines.length;
  showTable(columns, lines);
  const speed = (bytes, seconds) => seconds && bytes / 1e9 / seconds;
  drawn.push(showPaths("bandwidths", rows("time").map(row => ({ ...row, value: speed(row.bytes, row.value),
      low: speed(row.bytes, row.high), high: speed(row.bytes, row.low) })),
    ": bytes of K and V over the time of one call of one layer. " +
    (copy ? `This machine's memory copies at ${digits(copy)} GB/s; in brackets the share of that.`
          : "What this machine's memory copies at was not recorded."),
    digits, value => copy ? ` (${(100 * value / copy).toFixed(0)}%)` : ""));
  showRegressions();
  await Promise.all(drawn);
  if (turn !== shows) return;
  for (const part of document.querySelectorAll(".scroll")) {
    part.tabIndex = part.scrollWidth > part.clientWidth ? 0 : -1;
    part.classList.toggle("more", part.tabIndex === 0);
  }
  document.body.dataset.shown = CHOICES.map(name => chosen[name]).join(" ");
  afterwards?.();
  afterwards = undefined;
}

const follow = () => { chosen = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); show(); };
for (const name of CHOICES) $(name).addEventListener("change", event => go({ [name]: event.target.value }));
addEventListener("hashchange", follow);
$("to-words").onclick = event => { event.preventDefault(); $("words").scrollIntoView(); $("words").focus(); };
$("reasons").append(...Object.entries(WHY).flatMap(([word, text]) => [element("dt", word), element("dd", text)]));
if (DATA.series.length) follow();
else { $("choices").hidden = true; say("notice", "Nothing has been measured yet: make bench."); }
