// Two commits side by side.
// Whether a number changed from one commit to another: "improved", "worsened", "unchanged" or why that is not known.
function verdict(before, after, threshold, larger) {
  if (!known(before) || !known(after)) return "not comparable";
  const change = over(after.value, before.value);
  if (before.low === null || after.low === null) return "not judged";
  const apart = after.high < before.low || before.high < after.low;
  if (!apart || Math.max(change, 1 / change) <= threshold) return "unchanged";
  return (change > 1) === larger ? "improved" : "worsened";
}

// How far a change is from none, as much up as down.
const size = change => Math.abs(Math.log(change));

// One sentence over all verdicts of a comparison.
function sentence(judged) {
  const of = name => judged.filter(row => row.verdict === name);
  const span = rows => {
    const changes = rows.map(row => row.change).sort((a, b) => size(a) - size(b));
    return rows.length ? ` by ${unique([changes[0], changes.at(-1)].map(percent)).join(" to ")}` : "";
  };
  const [better, worse, same, open] = ["improved", "worsened", "unchanged", "not judged"].map(of);
  const word = better.length && worse.length ? "Mixed"
    : better.length ? "Improved" : worse.length ? "Worsened" : "Unchanged";
  return `${word}: ${many(better.length, "number")} improved${span(better)}, ${worse.length} worsened${span(worse)}, ` +
    `${same.length} unchanged` + (open.length ? `, ${open.length} without an interval.` : ".");
}

// How far a series moves between runs of identical code.
const moves = ({ threshold: [factor, words] }) =>
  `±${(100 * (factor - 1)).toFixed(0)}%` + (words.endsWith("guess") ? "?" : "");
const thresholdCell = cell => element("td", moves(cell), { title: cell.threshold[1] });

function showComparison(number) {
  const { commits } = series();
  const other = numberOf(chosen.against);
  const both = cell => other >= 0 && hasNumber(number)(cell) && hasNumber(other)(cell);
  const judged = MEASURES.flatMap(measure => cells(measure, both)).map(cell => {
    const [was, is] = [at(cell, other), at(cell, number)];
    const change = over(is.value, was.value);
    return { cell, was, is, change, verdict: verdict(was, is, cell.threshold[0], larger(cell.measure)) };
  });
  const labels = other < 0 ? [] : [commits[other].label, commits[number].label];
  say("compare-title", judged.length ? `${labels[0]} → ${labels[1]}. ${sentence(judged)}`
    : "No number of these two commits is of the same cell, so nothing can be compared.");
  const shown = judged.filter(row => chosen.changes === "all" || ["improved", "worsened"].includes(row.verdict));
  const rank = row => [MEASURES.indexOf(row.cell.measure), -size(row.change)];
  shown.sort((a, b) => rank(a)[0] - rank(b)[0] || rank(a)[1] - rank(b)[1]);
  $("compare-table").hidden = !shown.length;
  const head = element("tr");
  head.append(...["measure and cell", ...labels, "change", "threshold", ""].map(text => element("th", text)));
  $("compare-table").replaceChildren(head, ...shown.map(({ cell, was, is, change, verdict }) => {
    const line = element("tr");
    const path = cell.measure === "attention" ? `, ${cell.path}` : "";
    line.append(element("th", `${title(cell.measure)}: batch ${cell.batch}, ${cell.context} tokens` +
                (ofModels(cell.measure) ? "" : `, blocks of ${cell.block}`) + path, { scope: "row" }),
      numberCell(was, ratio), numberCell(is, ratio), element("td", percent(change)), thresholdCell(cell),
      element("td", verdict, { className: { improved: "good", worsened: "bad" }[verdict] ?? "na" }));
    return line;
  }));
}
