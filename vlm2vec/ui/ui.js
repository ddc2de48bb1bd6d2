// The page without reloading: the form is sent as it is, and what comes back takes the place of the results.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("ask"), text = $("text"), image = $("image"), results = $("results"), status = $("status");
const PATIENCE = 1500; // ms: a search that takes longer waits for Enter instead of starting while one types
const PAUSE = 350; // ms without a key before a search starts
let running = null; // AbortController of the search under way
let slow = false;
let timer = 0;
let like = new URLSearchParams(location.search).get("like") || "";
const pictures = []; // those of this visit, so that going back finds them

const state = () => ({
  text: text.value, instruction: $("instruction").value, top: $("top").value, like,
  picture: like || !image.files.length ? null : pictures.indexOf(image.files[0]),
});

const address = (asked) => {
  const values = new URLSearchParams();
  for (const name of asked.like ? ["like", "top"] : ["text", "instruction", "top"]) values.set(name, asked[name]); // no instruction is one too
  return asked.picture === null && (asked.text || asked.like) ? "/?" + values : "/";
};

// What is sent: an item stands in the stead of words and picture.
function body(asked) {
  const data = new FormData();
  for (const name of ["instruction", "top"]) data.set(name, asked[name]);
  if (asked.like) data.set("like", asked.like);
  else {
    data.set("text", asked.text);
    if (asked.picture !== null) data.set("image", pictures[asked.picture]);
  }
  return data;
}

async function search({ remember = true, focus = false } = {}) {
  clearTimeout(timer);
  const asked = state();
  if (!asked.like && !asked.text.trim() && asked.picture === null) return remember ? location.assign("/") : undefined;
  running?.abort();
  const mine = running = new AbortController();
  results.setAttribute("aria-busy", "true");
  document.body.classList.add("busy");
  const began = performance.now();
  try {
    const answer = await fetch("/search", { method: "POST", body: body(asked), headers: { accept: "text/html" }, signal: mine.signal });
    const found = await answer.text();
    if (mine !== running) return;
    const page = (answer.headers.get("content-type") || "").startsWith("text/html");
    page ? show(found) : fail(found || answer.statusText);
    slow = performance.now() - began > PATIENCE;
    if (remember && answer.ok) history.pushState(asked, "", address(asked));
  } catch (error) {
    if (error.name === "AbortError") return;
    fail("The server gives no answer. Is vlm2vec ui still running?");
  }
  if (mine !== running) return;
  rest();
  if (focus) {
    results.focus({ preventScroll: true });
    scrollTo({ top: 0 });
  }
}

function rest() {
  running?.abort();
  results.removeAttribute("aria-busy");
  document.body.classList.remove("busy");
}

function show(html) {
  results.innerHTML = html; // made and escaped by the server, and no script in it would run
  status.textContent = results.querySelector("h2")?.textContent || "";
}

function fail(message) {
  const box = document.createElement("div"), heading = document.createElement("h2"), words = document.createElement("p");
  box.className = "warning";
  box.setAttribute("role", "alert");
  heading.textContent = "That did not work";
  words.textContent = message;
  box.append(heading, words);
  results.replaceChildren(box);
}

function take(file) {
  if (file && file.size > Number(form.dataset.limit)) {
    setFile(null);
    rest();
    return fail(`the picture is too large: at most ${Math.floor(form.dataset.limit / 1e6)} MB are read`);
  }
  setFile(file);
  like = "";
  search();
}

function setFile(file) {
  const box = new DataTransfer();
  if (file) box.items.add(file);
  image.files = box.files;
  const kept = image.files[0];
  if (kept) pictures.push(kept);
  const shown = $("preview").querySelector("img");
  if (shown.src) URL.revokeObjectURL(shown.src);
  if (kept) shown.src = URL.createObjectURL(kept); else shown.removeAttribute("src");
  $("preview").hidden = !kept;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
text.addEventListener("input", () => {
  like = "";
  clearTimeout(timer);
  if (!slow && text.value.trim()) timer = setTimeout(search, PAUSE);
});
for (const id of ["instruction", "top"]) $(id).addEventListener("change", () => { if (!slow && form.reportValidity()) search(); });
image.addEventListener("change", () => take(image.files[0]));
$("remove").addEventListener("click", () => {
  setFile(null);
  text.focus();
  if (text.value.trim()) search();
});

// drop and paste, anywhere on the page
const carriesFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  document.body.classList.remove("over");
  if (!carriesFile(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  if (!file) return;
  event.preventDefault();
  take(file);
});

// links to searches: examples, and results as the next query
results.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/?']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  const values = new URL(link.href).searchParams;
  like = values.get("like") || "";
  text.value = values.get("text") || "";
  setFile(null);
  search({ focus: true });
});
results.addEventListener("error", (event) => event.target.closest?.(".frame")?.classList.add("absent"), true);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !event.target.closest("input")) {
    event.preventDefault();
    text.select();
    text.focus();
  }
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && event.target.closest(".more")) {
    const all = [...results.querySelectorAll(".more")];
    all[all.indexOf(event.target) + step]?.focus();
  }
});

addEventListener("popstate", (event) => {
  const asked = event.state;
  if (!asked) return location.reload();
  text.value = asked.like ? "" : asked.text;
  $("instruction").value = asked.instruction;
  $("top").value = asked.top;
  setFile(asked.picture === null ? null : pictures[asked.picture]);
  like = asked.like;
  search({ remember: false });
});

for (const each of document.querySelectorAll(".scripted")) each.hidden = false;
// What the address says is on the page already: going back to it asks again.
if (location.search) history.replaceState(state(), "", location.href);
// Pictures that failed before this script was there to hear of it.
for (const each of results.querySelectorAll(".frame img")) if (each.complete && !each.naturalWidth && each.loading !== "lazy") each.closest(".frame").classList.add("absent");
