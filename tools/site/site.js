// Search, tabs, the menu on a narrow screen, and small comforts. Every page is readable without.
"use strict";
const top_ = document.querySelector("script[data-top]").dataset.top;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --- dark or light: as the system is, until the button says otherwise ---
document.querySelector(".theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches && "dark");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.theme = root.dataset.theme; } catch { /* then for this page only */ }
});

// --- search: every word must occur; a hit in a title counts more than one in the text, and
// tutorials and how-tos count more than the reference, unless it is a name that is searched ---
const box = document.querySelector(".search input");
const results = document.querySelector(".results");
let loading = null;

function loadIndex() {
  loading ??= new Promise((done) => {
    const script = element("script", { src: top_ + "search-index.js" });
    script.onload = () => done(window.searchIndex);
    document.head.append(script);
  });
  return loading;
}

function score([href, page, section, text, guide], words) {
  const name = words.join(" ");
  let sum = 40 * (section.toLowerCase() === name || page.toLowerCase() === name) + 15 * guide;
  for (const word of words) {
    const titles = (page + " " + section).toLowerCase();
    const hit = titles.includes(word) * 10 + Math.min(5, text.toLowerCase().split(word).length - 1);
    if (!hit) return 0;
    sum += hit;
  }
  return sum + (href.includes("#") ? 0 : 1);
}

// The best sections, at most three of a page.
function best(found) {
  const seen = {};
  found.sort((a, b) => b[0] - a[0]);
  return found.filter(([, [, page]]) => (seen[page] = (seen[page] ?? 0) + 1) <= 3).slice(0, 12);
}

function excerpt(text, words) {
  const at = Math.max(0, text.toLowerCase().indexOf(words[0]));
  const start = at < 60 ? 0 : text.indexOf(" ", at - 50) + 1;
  const cut = text.slice(start, start + 150);
  const plain = words.map((word) => word.replace(/[^\w\s]/g, "\\$&"));
  const pattern = new RegExp("(" + plain.join("|") + ")", "gi");
  const parts = cut.split(pattern).map((part, i) => (i % 2 ? element("mark", {}, part) : part));
  return element("small", {}, start ? "… " : "", ...parts, " …");
}

async function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  results.hidden = words.length === 0;
  if (results.hidden) return;
  const index = await loadIndex();
  const found = index.map((entry) => [score(entry, words), entry]).filter(([s]) => s > 0);
  const items = best(found).map(([, entry]) => {
    const [href, page, section, text] = entry;
    const name = section && section !== page ? [element("b", {}, section), " · " + page]
      : [element("b", {}, page)];
    return element("li", {}, element("a", { href: top_ + href }, ...name, excerpt(text, words)));
  });
  results.replaceChildren(...(items.length ? items
    : [element("li", { class: "none" }, "Nothing found.")]));
}

function step(direction) {
  const links = [box, ...results.querySelectorAll("a")];
  const next = links.indexOf(document.activeElement) + direction;
  links[Math.max(0, Math.min(links.length - 1, next))].focus();
}

box.addEventListener("focus", loadIndex);
box.addEventListener("input", search);
document.querySelector(".search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    step(event.key === "ArrowDown" ? 1 : -1);
  }
  if (event.key === "Enter" && event.target === box) results.querySelector("a")?.click();
  if (event.key === "Escape") { box.focus(); results.hidden = true; }
});
results.addEventListener("click", () => { results.hidden = true; });
document.addEventListener("click", (event) => {
  if (!event.target.closest(".search")) results.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, textarea")) {
    event.preventDefault();
    box.focus();
  }
});

// --- the menu, and the contents folded where they stand above the text ---
const menu = document.querySelector(".menu");
menu.addEventListener("click", () => {
  const open = document.querySelector(".sidebar").classList.toggle("open");
  menu.setAttribute("aria-expanded", open);
});
const contents = document.querySelector(".contents");
const wide = matchMedia("(min-width: 75.01rem)");
const fold = () => { contents.open = wide.matches; };
wide.addEventListener("change", fold);
fold();

// --- mark the heading that is being read ---
const marks = new Map([...contents.querySelectorAll("a[href^='#']")]
  .map((a) => [document.getElementById(decodeURIComponent(a.hash.slice(1))), a]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const [heading, a] of marks) a.classList.toggle("here", heading === entry.target);
  }
}, { rootMargin: "-10% 0px -75% 0px" });
for (const [heading, a] of marks) {
  if (!heading) continue;
  seen.observe(heading);
  heading.append(element("a", { class: "anchor", href: a.hash, "aria-label": "Link here" }, "#"));
}

// --- tabs ---
for (const tabset of document.querySelectorAll(".tabset")) {
  const tabs = [...tabset.children];
  const buttons = tabs.map((tab) => {
    const title = tab.querySelector(".tab-title");
    title.hidden = true;
    return element("button", { role: "tab", type: "button" }, ...title.cloneNode(true).childNodes);
  });
  const show = (chosen) => tabs.forEach((tab, i) => {
    tab.hidden = i !== chosen;
    buttons[i].setAttribute("aria-selected", i === chosen);
  });
  buttons.forEach((button, i) => button.addEventListener("click", () => show(i)));
  tabset.prepend(element("div", { class: "tab-buttons", role: "tablist" }, ...buttons));
  show(0);
}

// --- copy code ---
for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = element("button", { class: "copy", type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
