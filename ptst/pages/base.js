
"use strict";
// Shared by all pages. Everything is legible without it; it writes text with textContent alone, never HTML.
const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = (id) => { const block = document.getElementById(id); return block ? JSON.parse(block.textContent) : null; };
document.documentElement.classList.add("scripted");

// Said to who listens, and shown where the page has a place for it.
function tell(text, place) {
  $("#told").textContent = text;
  if (place) place.textContent = text;
}

// The clipboard; where it is refused (a page opened from a file, in some browsers), the text is selected in a field.
async function copyText(text, place) {
  try {
    await navigator.clipboard.writeText(text);
    tell("Copied.", place);
  } catch {
    let field = $("#copied");
    if (!field) {
      field = document.createElement("textarea");
      field.id = "copied"; field.rows = 6; field.className = "code"; field.setAttribute("aria-label", "Text to copy");
      (place || document.body).after(field);
    }
    field.value = text; field.focus(); field.select();
    tell(document.execCommand("copy") ? "Copied." : "Press Ctrl+C to copy the selected text.", place);
  }
}

// Single keys as shortcuts, {key: function}: never while a field has the focus, nor where the reader turned them off.
function shortcuts(keys, toggle) {
  document.addEventListener("keydown", (event) => {
    const field = event.target.closest && event.target.closest("input:not([type=checkbox]), textarea, select");
    if (field || event.ctrlKey || event.metaKey || event.altKey || (toggle && !toggle.checked)) return;
    if (Object.hasOwn(keys, event.key)) { event.preventDefault(); keys[event.key](event); }
  });
}

// To a place in the page, opening what is folded around it.
function show(element, focus = false) {
  for (let e = element; e; e = e.parentElement) if (e.tagName === "DETAILS" && e !== element) e.open = true;
  element.scrollIntoView({ block: "center" });
  if (focus) element.focus({ preventScroll: true });
}

// A list that a field and checkboxes filter. `texts`: of each element, lower case; `kinds`: its value of a checkbox.
function filterList(elements, texts, kinds, field, boxes, after) {
  const apply = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const on = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const kept = elements.map((element, i) => {
      const keep = on.has(kinds[i]) && words.every((word) => texts[i].includes(word));
      if (element.hidden === keep) element.hidden = !keep;
      return keep;
    });
    after(kept);
  };
  let timer;
  field.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(apply, 120); });
  boxes.forEach((box) => box.addEventListener("change", apply));
  return apply;
}
