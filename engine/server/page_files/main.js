// The page's frame: tabs, theme, key, the picture that the tools share.

import { key, onKeyWanted, setKey } from "./api.js";
import { Ask } from "./ask.js";
import { Box } from "./box.js";
import { Detect } from "./detect.js";
import { announce, byId, bytes, el, fill } from "./dom.js";
import { openImage, pictures } from "./image.js";
import { Models } from "./models.js";
import { Segment } from "./segment.js";
import { Stage } from "./stage.js";
import { Track } from "./track.js";

const TABS = ["segment", "detect", "ask", "track", "box"];
const THEMES = ["auto", "light", "dark"];

const app = {
  base: new URL(".", import.meta.url).pathname.replace(/\/$/, ""),
  models: new Models(),
  image: null,
  active: null,
  stage: new Stage(byId("image-stage"), "Picture", "Drop or paste a picture here, or take a demo scene above."),
  clipStage: new Stage(byId("clip-stage"), "Frame of the clip", "Drop frames or a video here, or open the demo clip above."),
};
const tools = {
  segment: new Segment(app, byId("panel-segment")),
  detect: new Detect(app, byId("panel-detect")),
  ask: new Ask(app, byId("panel-ask")),
  track: new Track(app, byId("panel-track")),
  box: new Box(app, byId("panel-box")),
};

function open(name, { focus = false } = {}) {
  const changed = app.active !== tools[name];
  if (changed) app.active?.leave?.();
  app.active = tools[name];
  for (const other of TABS) {
    const tab = byId(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    byId(`panel-${other}`).hidden = other !== name;
  }
  byId("view-image").hidden = name === "track" || name === "box";
  byId("view-clip").hidden = name !== "track";
  document.body.dataset.tab = name;
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  if (focus) byId(`tab-${name}`).focus();
  if (changed) app.active.activate();
}

function tabs() {
  for (const [i, name] of TABS.entries()) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => open(name));
    tab.addEventListener("keydown", (event) => {
      const next = { ArrowRight: i + 1, ArrowLeft: i - 1 + TABS.length, Home: 0, End: TABS.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      open(TABS[next % TABS.length], { focus: true });
    });
  }
  addEventListener("hashchange", () => open(fromHash()));
  open(fromHash());
}

function fromHash() {
  const name = location.hash.slice(1);
  return TABS.includes(name) ? name : "segment";
}

function theme() {
  const button = byId("theme");
  const set = (choice) => {
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    byId("theme-name").textContent = choice;
  };
  const stored = () => (THEMES.includes(localStorage.getItem("pixano-edge-theme")) ? localStorage.getItem("pixano-edge-theme") : "auto");
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
    localStorage.setItem("pixano-edge-theme", next);
    set(next);
    tools.track.drawTimeline();
  });
  set(stored());
}

function keyForm() {
  const [form, field, button, hint] = ["key-form", "key", "key-button", "key-hint"].map(byId);
  const show = (on) => {
    form.hidden = !on;
    button.setAttribute("aria-expanded", String(on));
    if (on) field.focus();
  };
  const use = async (value) => {
    setKey(value);
    field.value = "";
    hint.textContent = value ? "A key is set. It is kept in this tab until you close it." : "Kept in this tab until you close it.";
    await app.models.refresh();
    if (!app.models.error) show(false);
    await tools.box.poll();
  };
  button.addEventListener("click", () => show(form.hidden));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) use(field.value.trim());
  });
  byId("key-forget").addEventListener("click", () => use(""));
  onKeyWanted.add((status) => {
    hint.textContent = status === 401 ? "It answers only to those who have one." : "The box does not know this key.";
    if (form.hidden) {
      show(true);
      announce("This box asks for an API key.");
    }
  });
}

async function setImage(file, words = [], name = file.name) {
  const facts = byId("image-facts");
  const mine = (setImage.last = {});
  try {
    // A copy in memory: the file on disk may change while one clicks.
    const kept = new File([await file.arrayBuffer()], name, { type: file.type });
    const image = await openImage(kept);
    if (setImage.last !== mine) {
      image.bitmap.close();
      return;
    }
    const old = app.image;
    app.image = { ...image, words };
    facts.className = "facts";
    facts.textContent = `${name}: ${image.width} × ${image.height} pixels, ${bytes(file.size)}`;
    app.stage.show({});
    app.stage.set(app.image);
    for (const tool of Object.values(tools)) tool.restart();
    if (app.active !== tools.segment) app.active.activate();
    old?.bitmap.close();
    announce(`${name} is open.`);
  } catch (error) {
    if (setImage.last !== mine) return;
    facts.className = "facts error";
    fill(facts, el("strong", { text: error.message }), " ", error.action ?? "");
    announce(error.message);
  }
}

function sources() {
  byId("image-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) setImage(file);
  });
  addEventListener("paste", (event) => {
    const [file] = pictures(event.clipboardData);
    if (file && !byId("view-image").hidden) setImage(file);
  });
  const over = (on) => document.body.classList.toggle("over", on);
  addEventListener("dragover", (event) => {
    event.preventDefault();
    over(event.dataTransfer.types.includes("Files"));
  });
  addEventListener("dragleave", (event) => over(event.relatedTarget !== null));
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    const files = [...event.dataTransfer.files];
    if (!files.length) return;
    if (app.active === tools.track) tools.track.drop(files);
    else if (app.active === tools.box) return;
    else setImage(files[0]);
  });
}

async function demoScenes() {
  const place = byId("demo-scenes");
  const response = await fetch(`${app.base}/demo/demo.json`).catch(() => null);
  const scenes = response?.ok ? (await response.json()).pictures : [];
  fill(place, scenes.map(({ file, objects, questions }, i) => el("button", {
    type: "button", class: "thumb", title: (objects.length ? objects : questions).join(", "),
    "aria-label": objects.length ? `Demo scene ${i + 1}: ${objects.join(", ")}` : `Picture to ask about: ${questions[0]}`,
    on: { click: async () => {
      const answer = await fetch(`${app.base}/demo/${file}`);
      await setImage(new File([await answer.blob()], file, { type: answer.headers.get("Content-Type") }), objects);
      if (questions.length) tools.ask.suggest(questions);
    } },
  }, el("img", { src: `${app.base}/demo/${file}`, alt: "", width: 44, height: 44, loading: "lazy" }))));
}

theme();
keyForm();
tabs();
sources();
demoScenes();
if (key()) byId("key-hint").textContent = "A key is set. It is kept in this tab until you close it.";
tools.box.poll();
