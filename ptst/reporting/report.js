
// The list of sections to jump to.
const jump = $("#jump");
for (const section of all("main section[id]")) {
  const option = document.createElement("option");
  option.value = section.id;
  option.textContent = $("h2", section).textContent.trim();
  jump.append(option);
}
jump.addEventListener("change", () => {
  const place = document.getElementById(jump.value);
  if (place) place.scrollIntoView();
  jump.selectedIndex = 0;
});
// What is printed is printed whole.
addEventListener("beforeprint", () => all("details").forEach((d) => { d.dataset.was = d.open; d.open = true; }));
addEventListener("afterprint", () => all("details").forEach((d) => { d.open = d.dataset.was === "true"; }));
