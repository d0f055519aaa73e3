"use strict";
(() => {
  const byId = id => document.getElementById(id);
  const index = JSON.parse(byId("index").textContent);
  const [feed, tools, none, opened, keys] = ["feed", "tools", "none", "opened", "keys"].map(byId);
  const field = tools.elements;
  const searched = index.ids.map((id, i) => `${id}\n${index.texts[i].join("\n")}`.toLowerCase());
  let shown = index.ids.map((_, i) => i);
  // The name of a file may hold halves of letters, which no address takes.
  const address = i => `#study=${encodeURIComponent(index.ids[i].toWellFormed())}`;
  let current = -1, descending = false, range = null, waiting = 0;

  // The list: an empty article a study, filled while it is near the view.
  const articles = index.ids.map((id, i) => {
    const article = document.createElement("article");
    article.tabIndex = -1;
    article.dataset.study = i;
    article.setAttribute("aria-label", `Study ${id}`);
    article.setAttribute("aria-setsize", index.ids.length);
    // A guess until the card was shown once.
    const longest = Math.max(...index.texts[i].map(text => text.length));
    article.style.minHeight = `${170 + Math.max(200, longest / 45 * 23)}px`;
    return article;
  });

  function fill(article, i) {
    article.innerHTML = byId(`s${i}`).textContent;
    for (const hole of article.querySelectorAll("[data-block]")) {
      const block = byId(hole.dataset.block);
      if (block) hole.innerHTML = block.textContent;
    }
    stress(article);
    article.dataset.filled = "";
  }

  // The score that the list is sorted by.
  function stress(article) {
    for (const value of article.querySelectorAll(".values [data-score]")) {
      value.classList.toggle("sorted", value.dataset.score === field.sort.value);
    }
  }

  function show(article) {
    if ("filled" in article.dataset) return;
    fill(article, article.dataset.study);
    article.style.minHeight = "";
  }

  function hide(article) {
    if (!("filled" in article.dataset) || (article !== document.activeElement && article.contains(document.activeElement))) return;
    // Out of the page it has no height, and the last guess stands.
    if (article.isConnected) article.style.minHeight = `${article.offsetHeight}px`;
    article.replaceChildren();
    delete article.dataset.filled;
  }

  const watcher = new IntersectionObserver(
    entries => {
      for (const entry of entries) (entry.isIntersecting ? show : hide)(entry.target);
    },
    { rootMargin: "900px 0px" },
  );
  articles.forEach(article => watcher.observe(article));

  // Paper has no scroll bar: it gets the first studies of the list.
  const onPaper = 48;
  let said = "";
  addEventListener("beforeprint", () => {
    shown.slice(0, onPaper).forEach(i => show(articles[i]));
    said = field.count.value;
    if (shown.length > onPaper) field.count.value = `the first ${onPaper} of ${shown.length.toLocaleString("en")} studies`;
  });
  addEventListener("afterprint", () => {
    field.count.value = said;
    // Watched anew, those out of view are told of, and emptied.
    for (const i of shown.slice(0, onPaper)) {
      watcher.unobserve(articles[i]);
      watcher.observe(articles[i]);
    }
  });

  // Which studies, in which order.
  function terms() {
    return [...field.text.value.toLowerCase().matchAll(/"([^"]+)"?|\S+/g)].map(found => found[1] ?? found[0]).filter(term => term !== '"');
  }

  function update() {
    const words = terms(), finding = field.finding?.value ?? "", kind = field.kind?.value ?? "", sort = field.sort.value;
    const wanted = letter => (kind ? kind.includes(letter) : letter !== ".");
    shown = index.ids.map((_, i) => i).filter(i => {
      if (!words.every(word => searched[i].includes(word))) return false;
      if (finding && !wanted(index.flags[i][finding])) return false;
      if (!finding && kind && ![...index.flags[i]].some(wanted)) return false;
      if (!range) return true;
      const value = index.scores[range.score][i];
      return value !== null && value >= range.low && (value < range.high || range.last);
    });
    if (sort) {
      const values = index.scores[sort], sign = descending ? -1 : 1;
      // A study without the score comes last either way.
      shown.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
    }
    const list = document.createDocumentFragment();
    shown.forEach((i, place) => {
      articles[i].setAttribute("aria-posinset", place + 1);
      articles[i].setAttribute("aria-setsize", shown.length);
      list.append(articles[i]);
    });
    feed.replaceChildren(list);
    feed.querySelectorAll("article[data-filled]").forEach(stress);
    const all = index.ids.length.toLocaleString("en");
    field.count.value = shown.length < index.ids.length ? `${shown.length.toLocaleString("en")} of ${all} studies` : `${all} studies`;
    none.hidden = shown.length > 0;
    field.order.hidden = !sort;
    field.order.textContent = descending ? "highest first" : "lowest first";
    field.range.hidden = !range;
    if (range) field.range.textContent = `${range.score} ${range.text} ×`;
    articles[current]?.classList.remove("current");
    current = -1;
    highlight();
  }

  // Words that were searched for, marked without a change to the cards.
  function highlight() {
    if (!CSS.highlights) return;
    const words = terms(), found = new Highlight();
    for (const article of words.length ? feed.querySelectorAll("article[data-filled]") : []) {
      for (const area of article.querySelectorAll("h3, .texts p")) {
        const walker = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
          const text = node.data.toLowerCase();
          for (const word of words) {
            for (let at = text.indexOf(word); at >= 0 && at + word.length <= node.length; at = text.indexOf(word, at + word.length)) {
              const part = new Range();
              part.setStart(node, at);
              part.setEnd(node, at + word.length);
              found.add(part);
            }
          }
        }
      }
    }
    CSS.highlights.set("found", found);
  }
  new MutationObserver(highlight).observe(feed, { childList: true, subtree: true });

  // One study after the other.
  function go(step) {
    if (!shown.length) return;
    let place = shown.indexOf(current);
    if (place < 0) {
      // From what is in view.
      const top = tools.getBoundingClientRect().bottom;
      const inView = shown.findIndex(i => articles[i].getBoundingClientRect().bottom > top + 40);
      place = inView < 0 ? shown.length - 1 : step > 0 ? inView - 1 : inView;
      if (step < 0 && inView < 0) place = shown.length;
    }
    select(shown[Math.min(Math.max(place + step, 0), shown.length - 1)]);
  }

  function select(i) {
    articles[current]?.classList.remove("current");
    current = i;
    articles[i].classList.add("current");
    show(articles[i]);
    articles[i].scrollIntoView({ block: "start" });
    if (opened.open) enlarge(i);
    else articles[i].focus({ preventScroll: true });
  }

  function enlarge(i) {
    const article = opened.querySelector("article"), place = shown.indexOf(i) + 1;
    fill(article, i);
    article.querySelectorAll("details").forEach(one => (one.open = true));
    opened.querySelector(".place").textContent = place ? `${place.toLocaleString("en")} of ${shown.length.toLocaleString("en")}` : "";
    opened.setAttribute("aria-label", `Study ${index.ids[i]}`);
    opened.querySelector("form").scrollTop = 0;
    if (!opened.open) opened.showModal();
    history.replaceState(null, "", address(i));
  }

  opened.addEventListener("close", () => {
    opened.querySelector("article").replaceChildren();
    history.replaceState(null, "", "#studies");
    articles[current]?.focus({ preventScroll: true });
  });
  opened.addEventListener("click", event => {
    if (event.target === opened || event.target.name === "close") opened.close();
    else if (event.target.name === "previous") go(-1);
    else if (event.target.name === "next") go(1);
  });
  keys.addEventListener("click", event => (event.target === keys || event.target.name === "close") && keys.close());
  feed.addEventListener("click", event => {
    const article = event.target.closest("article");
    if (!article || !event.target.closest(".open, .picture")) return;
    select(+article.dataset.study);
    enlarge(current);
  });

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.target === field.text && ["Escape", "Enter"].includes(event.key)) {
      event.preventDefault();
      clearTimeout(waiting);
      if (event.key === "Escape") field.text.value = "";
      field.text.blur();
      update();
      if (event.key === "Enter" && shown.length) select(shown[0]);
    }
    if (typing || keys.open) return;
    const act = {
      j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1),
      "?": () => keys.showModal(),
      "/": () => {
        if (opened.open) opened.close();
        field.text.focus();
        field.text.select();
      },
      Enter: event.target.matches("article") && !opened.open && current >= 0 ? () => enlarge(current) : null,
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  // Filters.
  tools.addEventListener("input", event => {
    clearTimeout(waiting);
    if (event.target === field.sort) descending = "error" in field.sort.selectedOptions[0].dataset;
    waiting = setTimeout(update, event.target === field.text ? 120 : 0);
  });
  tools.addEventListener("submit", event => event.preventDefault());
  tools.addEventListener("reset", () => {
    range = null;
    descending = false;
    setTimeout(update);
  });
  tools.addEventListener("click", event => {
    if (event.target === field.order) descending = !descending;
    else if (event.target === field.range) range = null;
    else {
      if (event.target === field.keys) keys.showModal();
      return;
    }
    update();
  });
  document.addEventListener("click", event => {
    const link = event.target.closest("[data-kind]"), column = event.target.closest("[data-score] rect[data-low]");
    if (link) {
      field.finding.value = index.findings.indexOf(link.dataset.finding);
      field.kind.value = link.dataset.kind;
      update();
    } else if (column) {
      const { low, high, last } = column.dataset, score = column.closest("[data-score]").dataset.score;
      range = { score, low: +low, high: +high, last: last !== undefined, text: column.textContent.split(":")[0] };
      field.sort.value = score;
      descending = false;
      update();
      byId("studies").scrollIntoView();
    }
  });

  tools.hidden = false;
  // A card that is gone to stops below the tools, whichever of them there are.
  new ResizeObserver(() => feed.style.setProperty("--tools", `${tools.offsetHeight}px`)).observe(tools);
  update();
  const wanted = index.ids.findIndex((_, i) => location.hash === address(i));
  if (wanted >= 0) {
    select(wanted);
    enlarge(wanted);
  }
})();
