
// The tokens: one of each document takes the focus, the arrow keys move on, a panel says what is known of it.
const report = data("findings-data");
const tokens = all(".document .t");
const places = new Map(tokens.map((token, i) => [token, i]));
let chosen = null;
let entrances = new Map();
all(".document .tokens").forEach((box) => {
  const first = $(".t", box);
  if (first) { first.tabIndex = 0; entrances.set(box, first); }
});

function choose(token) {
  if (chosen) chosen.classList.remove("chosen");
  chosen = token;
  $("#panel").hidden = !token;
  if (!token) return;
  token.classList.add("chosen");
  const box = token.closest(".tokens");
  entrances.get(box).tabIndex = -1;
  token.tabIndex = 0;
  entrances.set(box, token);
  $("#panel-text").textContent = token.textContent;
  $("#panel-details").textContent = token.title;
  tell(`${token.textContent}: ${token.title}`);
  const links = (token.dataset.findings || "").split(" ").filter(Boolean).map((number) => {
    const link = document.createElement("a");
    link.href = `#f${number}`;
    link.textContent = report.findings[number][report.fields.indexOf("rule")];
    return link;
  });
  $("#panel-findings").replaceChildren(...links.flatMap((link) => [link, " "]));
}

document.addEventListener("click", (event) => {
  const token = event.target.closest(".document .t");
  if (token) { choose(token); token.focus({ preventScroll: true }); }
});
document.addEventListener("focusin", (event) => {
  const token = event.target.closest(".document .t");
  if (token && token !== chosen) choose(token);
});
document.addEventListener("keydown", (event) => {
  const token = event.target.closest && event.target.closest(".document .t");
  const moves = { ArrowLeft: -1, ArrowRight: 1 };
  if (token && Object.hasOwn(moves, event.key)) {
    const next = tokens[places.get(token) + moves[event.key]];
    if (next) { event.preventDefault(); next.tabIndex = -1; next.focus(); }
  } else if (event.key === "Escape") choose(null);
});
$("#panel-close").addEventListener("click", () => choose(null));

function jump(token) { show(token); choose(token); }
function visit() {
  const place = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place) return;
  show(place);
  if (places.has(place)) choose(place);
}
addEventListener("hashchange", visit);
if (location.hash) visit();

const found = tokens.filter((token) => token.classList.contains("found"));
function nextFound(step) {
  if (!found.length) return tell("No token that is shown has a finding.", $("#hits"));
  const at = chosen ? places.get(chosen) : step > 0 ? -1 : tokens.length;
  const ahead = step > 0 ? found.find((t) => places.get(t) > at) : found.findLast((t) => places.get(t) < at);
  jump(ahead || (step > 0 ? found[0] : found.at(-1)));
}

// Search: over the whole text of each document, so that a hit may begin and end within tokens.
const SIGNS = { "\u00b7": " ", "\u21b5": "\n", "\u21e5": "\t", "\u240d": "\r" };
const plain = (text) => text.toLowerCase().replace(/[\u00b7\u21b5\u21e5\u240d]/g, (sign) => SIGNS[sign]);
let texts = null;
function readTexts() {
  texts = all(".document .tokens").map((box) => {
    const own = all(".t", box), starts = [];
    let text = "";
    for (const token of own) {
      starts.push(text.length);
      if (!token.classList.contains("part")) text += plain(token.textContent);
    }
    return { own, starts, text };
  });
}
let hits = [], hit = -1;
function search() {
  hits.flat().forEach((token) => token.classList.remove("hit", "at"));
  hits = []; hit = -1;
  const wanted = plain($("#search").value);
  if (!texts) readTexts();
  for (const { own, starts, text } of wanted ? texts : []) {
    let n = 0;
    for (let i = text.indexOf(wanted); i >= 0; i = text.indexOf(wanted, i + wanted.length)) {
      while (n + 1 < starts.length && starts[n + 1] <= i) n++;
      let last = n;
      while (last + 1 < starts.length && starts[last + 1] < i + wanted.length) last++;
      hits.push(own.slice(n, last + 1));
    }
  }
  hits.flat().forEach((token) => token.classList.add("hit"));
  tell(wanted ? (hits.length ? `${hits.length} hit${hits.length > 1 ? "s" : ""}` : "no hit") : "", $("#hits"));
}
function nextHit(step) {
  if (!hits.length) return;
  if (hit >= 0) hits[hit].forEach((token) => token.classList.remove("at"));
  hit = (hit + step + hits.length + (hit < 0 && step < 0 ? 1 : 0)) % hits.length;
  hits[hit].forEach((token) => token.classList.add("at"));
  jump(hits[hit][0]);
  tell(`hit ${hit + 1} of ${hits.length}`, $("#hits"));
}
let waiting;
$("#search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
$("#search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    if (hit < 0) { clearTimeout(waiting); search(); }
    nextHit(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape") event.target.blur();
});
$("#next").addEventListener("click", () => nextHit(1));
$("#previous").addEventListener("click", () => nextHit(-1));
$("#next-found").addEventListener("click", () => nextFound(1));

shortcuts({
  "/": () => $("#search").focus(), n: () => nextHit(1), p: () => nextHit(-1), f: () => nextFound(1), b: () => nextFound(-1),
}, $("#shortcuts"));

// The findings: filtered by words and level, copied as JSON with the names of their fields.
if ($("#filter")) {
  const objects = report.findings.map((values) => Object.fromEntries(report.fields.map((name, i) => [name, values[i]])));
  const lines = objects.map((f) => [f.rule, f.row, f.token ?? "", f.cause, f.expected, f.seen].join(" ").toLowerCase());
  let kept = objects.map(() => true);
  const elements = objects.map((_, i) => document.getElementById(`f${i}`));
  filterList(elements, lines, objects.map((f) => f.level), $("#filter"), all(".filter-level"), (now) => {
    kept = now;
    all(".rule, .rule ol").forEach((box) => { box.hidden = !$("li:not([hidden])", box); });
    const number = now.filter(Boolean).length;
    tell(number === now.length ? "" : `${number} of ${now.length} findings`, $("#kept"));
  });
  $("#copy").addEventListener("click", () => {
    const chosen = objects.filter((_, i) => kept[i]).map((f) => ({ ...f, ...report.rules[f.rule] }));
    copyText(JSON.stringify(chosen, null, 1), $("#kept"));
  });
}
