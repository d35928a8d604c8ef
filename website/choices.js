// What the reader has chosen, also in the address: a view can be sent to somebody, and gone back from.
const CHOICES = ["machine", "commit", "against", "batch", "block", "path", "span", "columns", "changes"];
const MEASURES = ["first", "tokens", "step", "bound", "attention"];
const NEWEST = 30; // commits that are shown besides the phases
const COLUMNS = { users: "what users get", adr: "ADR 0001's: the paths of phase 0" };
const CHANGES = { changed: "what changed", all: "all" };
const SPANS = { recent: `phases and the newest ${NEWEST}`, all: "all" };
const named = one => one.machine +
  (DATA.series.filter(other => other.machine === one.machine).length > 1 ? ` (${one.environment})` : "");
let chosen = {};
const series = () => DATA.series.find(one => named(one) === chosen.machine);
const short = hash => hash.slice(0, 8);
const numberOf = hash => hash ? series().commits.findIndex(commit => commit.hash.startsWith(hash)) : -1;
const title = measure => document.querySelector(`#${measure} h2`).textContent;
const cells = (measure, ...fits) => cellsOf(series()).filter(cell => cell.measure === measure && fits.every(fit => fit(cell)));
const hasNumber = commit => cell => Array.isArray(cell.values[commit]);
const ofModels = measure => measure === "first" || measure === "tokens"; // in blocks of one size
const inBlock = cell => ofModels(cell.measure) || cell.block === +chosen.block;
const inBatch = cell => cell.measure === "first" || cell.batch === +chosen.batch; // a prompt is alone
const onPath = cell => cell.path === (cell.measure === "attention" ? chosen.path : "auto");
const larger = measure => DATA.larger.includes(measure);

for (const section of document.querySelectorAll(".measure")) {
  const made = $("of-measure").content.cloneNode(true);
  for (const part of made.querySelectorAll("[data-id]")) part.id = `${section.id}-${part.dataset.id}`;
  section.append(made);
}

// Goes to a view; the address changes first and what is shown follows it.
function go(changes) {
  const address = "#" + new URLSearchParams({ ...chosen, ...changes });
  if (address === location.hash) show();
  else location.hash = address;
}
const button = (text, changes, then) => element("button", text, {
  type: "button", className: "link", onclick: () => { afterwards = then; go(changes); } });
let afterwards; // what is done once a view is shown

// Fills a menu. What the address asks for and is not there is replaced, and said in `refused`.
function offer(name, values, preferred, label = String, refused = []) {
  const texts = values.map(String);
  const asked = chosen[name];
  if (!texts.includes(asked)) {
    chosen[name] = String(preferred ?? values.at(-1) ?? "");
    if (asked) refused.push(`There is no ${$(name).parentElement.firstChild.textContent.trim()} ${asked} here: shown is ${chosen[name]}.`);
  }
  $(name).replaceChildren(...values.map(value =>
    element("option", label(value), { value, selected: String(value) === chosen[name] })));
  $(name).parentElement.hidden = values.length < 1;
}

// The newest commit before another with a number in one of its cells.
function before(number) {
  const there = cellsOf(series()).filter(cell => MEASURES.includes(cell.measure) && hasNumber(number)(cell));
  for (let earlier = number - 1; earlier >= 0; earlier--)
    if (there.some(hasNumber(earlier))) return earlier;
}

function offerMachines(refused) {
  offer("machine", DATA.series.map(named), named(DATA.series[0]),
        name => name + (DATA.series.find(one => named(one) === name).retired ? " (retired)" : ""), refused);
}

function offerCells(refused) {
  const { commits } = series();
  const all = cellsOf(series());
  const first = MEASURES.find(measure => cells(measure).length);
  const latest = commits.findLastIndex((_, number) => (first ? cells(first) : all).some(hasNumber(number)));
  const newestFirst = commits.map(commit => short(commit.hash)).reverse();
  const text = hash => { const { label, subject } = commits[numberOf(hash)]; return `${label}: ${subject}`; };
  offer("commit", newestFirst, short(commits.at(latest).hash), text, refused);
  const number = numberOf(chosen.commit), earlier = before(number);
  const others = newestFirst.filter(hash => hash !== chosen.commit);
  offer("against", others, earlier === undefined ? others[0] : short(commits[earlier].hash), text);
  const ratios = all.filter(cell => MEASURES.includes(cell.measure));
  const sized = ratios.length ? ratios : all;
  const batches = numbers(sized.map(cell => cell.batch));
  offer("batch", batches, batches[0], undefined, refused);
  const blocks = numbers(sized.map(cell => cell.block));
  offer("block", blocks, blocks.includes(32) ? 32 : blocks[0], undefined, refused);
  offer("path", unique(cells("attention").map(cell => cell.path)).sort(), "auto",
        path => path === "auto" ? "auto: what the package chooses" : path, refused);
  offer("span", Object.keys(SPANS), "recent", key => SPANS[key]);
  $("span").parentElement.hidden = commits.length <= 2 * NEWEST;
  offer("columns", Object.keys(COLUMNS), "users", key => COLUMNS[key]);
  offer("changes", Object.keys(CHANGES), "changed", key => CHANGES[key]);
  say("notice", refused.join(" "));
}

// The commits that are shown of those with a number in some cells, oldest first.
function spanOf(found) {
  const { commits } = series();
  const measured = commits.map((_, number) => number).filter(number => found.some(hasNumber(number)));
  if (chosen.span === "all" || commits.length <= 2 * NEWEST) return measured;
  const newest = new Set([...measured.slice(-NEWEST), numberOf(chosen.commit)]);
  return measured.filter(number => commits[number].phase || newest.has(number));
}
