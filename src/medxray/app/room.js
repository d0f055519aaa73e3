"use strict";
// Window, level and zoom of the pictures, the sentence that is pointed at, and saving: all of it stays in the browser.
(() => {
  const LEVELS = 4096;
  const shown = { window: 100, level: 50, invert: false, move: false, scale: 1, x: 0, y: 0 };
  const start = { ...shown };
  const pictures = new Map();
  let pinned = null;

  // Pictures.
  async function open(canvas) {
    const image = new Image();
    image.src = canvas.dataset.levels;
    delete canvas.dataset.levels;
    pictures.set(canvas, null);
    await image.decode();
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    const levels = new Uint16Array(canvas.width * canvas.height);
    for (let i = 0; i < levels.length; i++) levels[i] = (data[4 * i] << 8) | data[4 * i + 1];
    pictures.set(canvas, { context, levels, pixels: context.createImageData(canvas.width, canvas.height) });
    draw();
  }

  function draw() {
    const width = (shown.window / 100) * (LEVELS - 1), low = (shown.level / 100) * (LEVELS - 1) - width / 2;
    const gray = Uint8ClampedArray.from({ length: LEVELS }, (_, level) => {
      const value = (255 * (level - low)) / width;
      return shown.invert ? 255 - Math.min(255, Math.max(0, value)) : value;
    });
    for (const [canvas, picture] of pictures) {
      if (!canvas.isConnected) pictures.delete(canvas);
      if (!picture) continue;
      const { context, levels, pixels } = picture, data = new Uint32Array(pixels.data.buffer);
      for (let i = 0; i < levels.length; i++) data[i] = 0xff000000 | (gray[levels[i]] * 0x010101);
      context.putImageData(pixels, 0, 0);
      canvas.closest(".view").dataset.drawn = "";
    }
  }

  function show(change, viewer = document.querySelector(".viewer")) {
    if (!viewer) return;
    Object.assign(shown, change);
    shown.window = Math.min(200, Math.max(1, shown.window));
    shown.level = Math.min(100, Math.max(0, shown.level));
    shown.scale = Math.min(8, Math.max(1, shown.scale));
    if (shown.scale === 1) shown.x = shown.y = 0;
    const reach = (shown.scale - 1) / 2;
    for (const axis of ["x", "y"]) shown[axis] = Math.min(reach, Math.max(-reach, shown[axis]));
    for (const name of ["window", "level"]) {
      const input = viewer.querySelector(`[name=${name}]`);
      input.value = shown[name];
      input.nextElementSibling.value = `${Math.round(shown[name])} %`;
    }
    for (const name of ["invert", "move"]) viewer.querySelector(`[data-action=${name}]`).setAttribute("aria-pressed", shown[name]);
    viewer.classList.toggle("moving", shown.move);
    viewer.style.setProperty("--zoom", shown.scale);
    viewer.style.setProperty("--x", `${100 * shown.x}%`);
    viewer.style.setProperty("--y", `${100 * shown.y}%`);
    if (["window", "level", "invert"].some(name => name in change)) requestAnimationFrame(draw);
  }

  const zoom = factor => show({ scale: shown.scale * factor, move: shown.scale * factor > 1.01 });
  const actions = {
    invert: () => show({ invert: !shown.invert }), move: () => show({ move: !shown.move }), reset: () => show(start),
    smaller: () => zoom(0.8), larger: () => zoom(1.25),
  };
  const keys = { "+": "larger", "=": "larger", "-": "smaller", i: "invert", m: "move", r: "reset" };
  const arrows = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

  document.addEventListener("input", event => {
    const name = event.target.closest(".viewer") && event.target.name;
    if (name) show({ [name]: +event.target.value });
  });

  document.addEventListener("pointerdown", event => {
    const stage = event.target.closest(".stage");
    if (!stage || event.button || (event.pointerType === "touch" && !shown.move)) return;
    const { clientX, clientY } = event, before = { ...shown }, { width, height } = stage.getBoundingClientRect();
    const drag = at => {
      const right = (at.clientX - clientX) / width, down = (at.clientY - clientY) / height;
      show(before.move ? { x: before.x + right, y: before.y + down }
        : { window: before.window + 120 * right, level: before.level + 80 * down });
    };
    stage.setPointerCapture(event.pointerId);
    stage.addEventListener("pointermove", drag);
    for (const end of ["pointerup", "pointercancel"]) {
      stage.addEventListener(end, () => stage.removeEventListener("pointermove", drag), { once: true });
    }
  });

  document.addEventListener("wheel", event => {
    if (!event.target.closest(".stage")) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.12 : 1 / 1.12);
  }, { passive: false });

  // Sentences and where the model looked.
  function look(sentence) {
    for (const heat of document.querySelectorAll(".heat")) heat.classList.remove("on");
    for (const other of document.querySelectorAll(".sentence.looked")) other.classList.remove("looked");
    for (const line of document.querySelectorAll(".readout")) line.textContent = line.dataset.rest;
    if (!sentence) return;
    sentence.classList.add("looked");
    const reading = sentence.closest(".reading"), tile = +sentence.dataset.tile;
    reading.querySelector(".readout").textContent = sentence.dataset.said || reading.querySelector(".readout").dataset.rest;
    for (const sheet of reading.querySelectorAll(".sheet")) {
      const heat = document.querySelector(`.stage[data-view="${sheet.dataset.view}"] .heat`), across = +sheet.dataset.across;
      if (!heat) continue;
      heat.style.cssText = `${sheet.dataset.style};--column:${tile % across};--row:${Math.floor(tile / across)}`;
      if (!heat.firstChild) heat.append(Object.assign(new Image(), { alt: "" }));
      if (heat.firstChild.src !== sheet.dataset.source) heat.firstChild.src = sheet.dataset.source;
      heat.classList.add("on");
    }
  }

  function pin(sentence) {
    pinned?.setAttribute("aria-pressed", "false");
    pinned = sentence === pinned ? null : sentence;
    pinned?.setAttribute("aria-pressed", "true");
    look(pinned ?? sentence);
  }

  const sentenceOf = event => event.target.closest?.(".sentence");
  for (const [come, go] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    document.addEventListener(come, event => sentenceOf(event) && look(sentenceOf(event)));
    document.addEventListener(go, event => sentenceOf(event) && look(pinned));
  }

  // Saving.
  function save(button) {
    const form = button.closest("form"), made = JSON.parse(form.dataset.made), text = form.querySelector("textarea")?.value;
    const draft = text === undefined ? {} : { draft: text, edited: text !== made.generated };
    const content = button.dataset.save === "json" ? JSON.stringify({ ...draft, ...made }, null, 1) : `${text}\n\n${made.model}, draft. ${made.notice}`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${content}\n`], { type: button.dataset.save === "json" ? "application/json" : "text/plain" }));
    link.download = `draft-${made.model.replace(/[^\w-]+/g, "-")}.${button.dataset.save}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  document.addEventListener("click", event => {
    const button = event.target.closest?.("[data-action], [data-save]");
    if (button?.dataset.action) actions[button.dataset.action]();
    else if (button) save(button);
    else if (sentenceOf(event)) pin(sentenceOf(event));
  });

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const stage = event.target.closest?.(".stage");
    if (stage && keys[event.key]) actions[keys[event.key]]();
    else if (stage && arrows[event.key] && shown.scale > 1) {
      const [x, y] = arrows[event.key];
      show({ x: shown.x + x / 10, y: shown.y + y / 10 });
    } else if (event.target.matches?.(".sentence") && ["Enter", " "].includes(event.key)) pin(event.target);
    else if (event.key === "Escape" && pinned) pin(pinned), look(null);
    else return;
    event.preventDefault();
  });

  // What the server sends takes the place of what was there.
  const voice = Object.assign(document.createElement("p"), { className: "unseen" });
  voice.setAttribute("role", "status");
  const watch = () => {
    const fresh = document.querySelectorAll("canvas[data-levels]");
    if (fresh.length) {
      pinned = null;
      show(start);
      fresh.forEach(open);
    }
    const said = document.querySelector(".readings")?.dataset.said ?? "";
    if (voice.textContent !== said) voice.textContent = said;
  };
  const begin = () => {
    document.body.append(voice);
    new MutationObserver(watch).observe(document.body, { childList: true, subtree: true });
    watch();
  };
  if (document.body) begin();
  else addEventListener("DOMContentLoaded", begin);
})();
