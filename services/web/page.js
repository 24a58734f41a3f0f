// The page over the API: lists, progress, the pair viewer, reports. Everything shown is text or an image of this server.
// A service with keys answers 401; then the page asks for one, keeps it in sessionStorage and sends it with every fetch.

import { markdown } from "./report.js";

const byId = (id) => document.getElementById(id);
const POLL_MS = 2000;
const view = { job: null, pairs: [], next: null, at: 0, mode: "side" };

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const KEY = "cffa-key";
let asking = null;

function askForKey(detail) {
  asking ??= new Promise((given) => {
    const dialog = byId("key-dialog");
    byId("key-hint").textContent = `${detail}. It is kept in this tab until it is closed.`;
    dialog.addEventListener("close", () => {
      const key = byId("key").value.trim();
      byId("key").value = "";
      if (key) sessionStorage.setItem(KEY, key);
      asking = null;
      given();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { Accept: "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    // Another request may have asked, and got a new key, while this one was on its way.
    if (key === sessionStorage.getItem(KEY)) await askForKey(key ? "This key is not accepted" : "This service wants a key");
  }
}

async function get(path) {
  const answer = await send(path);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail ?? answer.statusText);
  return body;
}

// An <img> sends no key, so with one the image is fetched and shown from memory. Made once per image, in order of need.
const images = new Map();

async function showImage(image, url) {
  image.dataset.url = url;
  if (!sessionStorage.getItem(KEY)) { image.src = url; return; }
  if (!images.has(url)) images.set(url, send(url).then((answer) => answer.ok ? answer.blob() : null)
    .then((blob) => blob && URL.createObjectURL(blob)));
  const shown = await images.get(url);
  if (shown && image.dataset.url === url) image.src = shown;
}

function forgetImages() {
  for (const made of images.values()) made.then((url) => url && URL.revokeObjectURL(url));
  images.clear();
}

const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) {
    inView.unobserve(target);
    showImage(target, target.dataset.url);
  }
}, { rootMargin: "400px" });

async function showDocument(title, path) {
  try {
    byId("document-text").textContent = JSON.stringify(await get(path), null, 2);
  } catch (error) {
    byId("document-text").textContent = error.message;
  }
  byId("document-title").textContent = title;
  byId("document").showModal();
}

const ago = (time) => {
  const seconds = Math.max(0, (Date.now() - new Date(time)) / 1000);
  for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]])
    if (seconds >= size) return `${Math.floor(seconds / size)} ${name} ago`;
  return "just now";
};
const lasting = (seconds) => seconds >= 5400 ? `${(seconds / 3600).toFixed(1)} h`
  : seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`;
const bytes = (count) => count >= 1e9 ? `${(count / 1e9).toFixed(1)} GB` : count >= 1e6 ? `${(count / 1e6).toFixed(1)} MB`
  : `${Math.ceil(count / 1e3)} kB`;

function replaceCards(list, cards, empty) {
  byId(list).replaceChildren(...(cards.length ? cards : [element("li", { className: "soft", textContent: empty })]));
}

async function act(job, verb) {
  const answer = await send(`v1/jobs/${job.id}:${verb}`, { method: "POST" });
  if (!answer.ok) alert((await answer.json()).detail);
  await refresh();
}

const KINDS = { training: "Training", generation: "Generation", evaluation: "Evaluation", export: "Export",
  attention: "Attention", edit: "Edit", captioned_training: "Captioned training", captioned: "Captioned" };
const PAIRS = ["generation", "edit"];
const REPORTS = ["evaluation", "attention", "captioned"];
const texts = ({ texts: all, images_per_text: each }) => `${all.length * each} image${all.length * each === 1 ? "" : "s"} of “${all[0]}”`
  + (all.length > 1 ? ` and ${all.length - 1} more` : "");

const edited = ({ edits, count, dataset_id, generation_job_id }) =>
  `${edits.map(({ direction, text }) => `${direction} “${text}”`).join(", ") || "nothing"}: `
  + `${count} pair${count === 1 ? "" : "s"} of ${dataset_id ?? generation_job_id}`;

function subject({ kind, spec }) {
  if (kind === "training") return `${spec.method} on ${spec.base}, ${spec.steps} steps`;
  if (kind === "generation") return `${spec.count} pairs at ${spec.resolution} px`;
  if (kind === "edit") return edited(spec);
  if (kind === "export") return `${spec.form} of ${spec.generation_job_id}`;
  if (kind === "attention") return `${spec.kinds.join(" and ")} attention of pair ${spec.index}, seed ${spec.seed}`;
  if (kind === "captioned_training") return `${spec.modality.toUpperCase()} captions of ${spec.dataset_id}, ${spec.steps} steps`;
  if (kind === "captioned") return spec.task === "text_to_image" ? texts(spec) : `captions of ${spec.dataset_id}`;
  return `pairs of ${spec.generation_job_id ?? spec.pairs_dataset_id}, at most ${spec.max_pairs}`;
}

function jobCard(job) {
  const { progress } = job;
  const done = job.state === "succeeded";
  const bar = element("progress", { max: Math.max(1, progress.total), value: done ? Math.max(1, progress.total) : progress.current,
    className: done ? "done" : "" });
  bar.setAttribute("aria-label", `Progress of ${job.id}`);
  const buttons = element("span", { className: "end row" });
  const button = (text, onclick) => buttons.append(element("button", { type: "button", textContent: text, onclick }));
  if (PAIRS.includes(job.kind) && job.counts.generated) button("View pairs", async () => {
    await choose(job.id);
    byId("pairs-section").scrollIntoView({ behavior: "smooth" });
  });
  if (REPORTS.includes(job.kind) && done) button("View report", async () => {
    await chooseReport(job.id);
    byId("report-section").scrollIntoView({ behavior: "smooth" });
  });
  if (["queued", "running", "finalizing"].includes(job.state)) button("Cancel", () => act(job, "cancel"));
  if (["failed", "canceled"].includes(job.state)) button("Retry", () => act(job, "retry"));
  if (job.state === "paused") button("Resume", () => act(job, "resume"));
  const steps = progress.total > (done ? 1 : 0) ? `${progress.stage} ${progress.current} of ${progress.total}` : progress.stage;
  const eta = progress.eta_seconds && !job.terminal ? `, about ${lasting(progress.eta_seconds)} left` : "";
  const place = job.queue_position ? `, number ${job.queue_position} in the queue` : "";
  return element("li", { className: job.id === view.job ? "card chosen" : "card" },
    element("div", { className: "row" }, element("strong", { textContent: KINDS[job.kind] ?? job.kind }),
      element("span", { textContent: subject(job) }), element("span", { className: `state ${job.state}`, textContent: job.state }), buttons),
    bar,
    element("div", { className: "row soft" }, `${steps}${eta}${place}`,
      element("span", { className: "end" }, element("code", { textContent: job.id }), ` ${ago(job.created_at)}`)),
    job.error || job.reason ? element("div", { className: "bad", textContent: job.error?.message ?? job.reason }) : null);
}

const datasetCard = (dataset) => element("li", { className: "card" },
  element("div", { className: "row" }, element("strong", { textContent: dataset.name }), `${dataset.pairs} pairs`,
    element("span", { className: "soft end", textContent: ago(dataset.created_at) })), element("code", { textContent: dataset.id }),
  " ", element("button", { type: "button", textContent: "Report",
    onclick: () => showDocument(`Report of ${dataset.name}`, `v1/datasets/${dataset.id}/report`) }));

const modelCard = (model) => element("li", { className: "card" },
  element("div", { className: "row" }, element("strong", { textContent: model.method ?? model.family }),
    `${model.base ? `on ${model.base}, ` : ""}step ${model.step ?? "?"}`,
    element("span", { className: "soft end", textContent: ago(model.created_at) })),
  element("code", { textContent: model.id }), " ", element("button", { type: "button", textContent: "Card",
    onclick: () => showDocument(`Card of ${model.id}`, `v1/models/${model.id}/card`) }));

function pairButton(pair, at) {
  const image = (file, alt) => {
    const made = element("img", { alt: `${alt} of pair ${pair.index}` });
    made.dataset.url = file.url;
    inView.observe(made);
    return made;
  };
  return element("li", {}, element("button", { type: "button", className: "pair", onclick: () => open(at) },
    image(pair.cf, "CF"), image(pair.fa, "FA"), element("span", { className: "soft", textContent: `Pair ${pair.index}` })));
}

async function choose(job) {
  Object.assign(view, { job, pairs: [], next: null });
  forgetImages();
  byId("pairs-title").textContent = `Pairs of ${job}`;
  byId("pairs").replaceChildren();
  byId("pairs-section").hidden = false;
  byId("report-section").hidden = true;
  await Promise.all([morePairs(), archives(), refresh()]);
  remember();
}

async function morePairs() {
  const token = view.next ? `&page_token=${encodeURIComponent(view.next)}` : "";
  const page = await get(`v1/jobs/${view.job}/pairs?page_size=24${token}`);
  const first = view.pairs.length;
  view.pairs.push(...page.items);
  view.next = page.next_page_token;
  byId("pairs").append(...page.items.map((pair, offset) => pairButton(pair, first + offset)));
  byId("more").hidden = !view.next;
}

async function archives() {
  const found = await get(`v1/jobs/${view.job}/archives`);
  const link = (archive, name) => element("li", {}, element("a", { href: archive.url,
    textContent: `${name} (${archive.pairs} pairs, ${bytes(archive.bytes)})`, title: `sha256 ${archive.sha256}` }));
  byId("archives").replaceChildren(...(found.whole ? [link(found.whole, "Whole archive")] : []),
    ...found.parts.map((part) => link(part, `Part ${part.number}`)));
}

async function chooseReport(job) {
  const answer = await send(`v1/jobs/${job}/report/report.md`);
  const { files } = await get(`v1/jobs/${job}/report`);
  Object.assign(view, { job, pairs: [], next: null });
  forgetImages();
  const picture = (file, title) => {
    const made = element("img", { alt: title, title });
    made.dataset.url = `v1/jobs/${job}/report/${encodeURIComponent(file)}`;
    inView.observe(made);
    return made;
  };
  byId("report-title").textContent = `Report of ${job}`;
  byId("report-files").replaceChildren(...files.map((file) => element("li", {}, element("a", { href: file.url,
    textContent: `${file.name} (${bytes(file.bytes)})`, title: `sha256 ${file.sha256}` }))));
  byId("report").replaceChildren(...markdown(await answer.text(), element, picture));
  byId("pairs-section").hidden = true;
  byId("report-section").hidden = false;
  await refresh();
  remember();
}

function open(at) {
  const pair = view.pairs[at];
  if (!pair) return;
  view.at = at;
  byId("viewer-title").textContent = `Pair ${pair.index}, seed ${pair.seed}`;
  showImage(byId("stage-cf"), pair.cf.url);
  showImage(byId("stage-fa"), pair.fa.url);
  for (const made of document.querySelectorAll("[data-edited]")) made.hidden = !pair.sheet;
  if (pair.sheet) showImage(byId("stage-sheet"), pair.sheet.url);
  else if (view.mode === "sheet") compare("side");
  byId("previous").disabled = at === 0;
  byId("next").disabled = at === view.pairs.length - 1;
  if (!byId("viewer").open) byId("viewer").showModal();
  remember();
}

function compare(mode) {
  view.mode = byId("stage").dataset.mode = mode;
  for (const button of document.querySelectorAll("[data-mode]"))
    if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  byId("amount-label").hidden = mode === "side" || mode === "sheet";
  byId("amount-name").textContent = mode === "checker" ? "Square size" : "Position";
  remember();
}

// The address says what is shown (#job, #job/pair/mode), so that it can be sent to somebody.
function remember() {
  const pair = byId("viewer").open ? `/${view.at}/${view.mode}` : "";
  if (view.job) history.replaceState(null, "", `#${view.job}${pair}`);
}

async function recall() {
  const [job, at, mode] = location.hash.slice(1).split("/");
  if (!job.startsWith("job_")) return;
  const { kind, state } = await get(`v1/jobs/${job}`);
  if (REPORTS.includes(kind)) return state === "succeeded" ? chooseReport(job) : undefined;
  if (!PAIRS.includes(kind)) return;
  await choose(job);
  if (["side", "slider", "checker", "sheet"].includes(mode)) compare(mode);
  if (at) open(Number(at));
}

function slide() {
  const amount = Number(byId("amount").value);
  byId("stage").style.setProperty("--amount", `${amount}%`);
  byId("stage").style.setProperty("--cell", `${100 / Math.max(1, Math.round(12 - amount / 10))}%`);
}

async function refresh() {
  try {
    const [jobs, datasets, models, queue] = await Promise.all(
      ["v1/jobs?page_size=50", "v1/datasets", "v1/models", "v1/queue"].map(get));
    replaceCards("jobs", jobs.items.map(jobCard), "No jobs yet. cffa submit train posts one.");
    replaceCards("datasets", datasets.items.map(datasetCard), "No data sets yet. cffa submit train --dataset FOLDER uploads one.");
    replaceCards("models", models.items.map(modelCard), "No models yet; a training job makes one.");
    byId("queue").textContent = `${queue.waiting} waiting, ${queue.running} running, ${queue.workers} worker${queue.workers === 1 ? "" : "s"}`;
  } catch (error) {
    byId("queue").textContent = `no answer: ${error.message}`;
  }
}

byId("more").addEventListener("click", morePairs);
byId("amount").addEventListener("input", slide);
byId("close").addEventListener("click", () => byId("viewer").close());
byId("viewer").addEventListener("close", remember);
byId("previous").addEventListener("click", () => open(view.at - 1));
byId("next").addEventListener("click", () => open(view.at + 1));
for (const button of document.querySelectorAll("button[data-mode]"))
  button.addEventListener("click", () => compare(button.dataset.mode));
byId("viewer").addEventListener("keydown", (event) => {
  if (event.target.type === "range") return;
  if (event.key === "ArrowLeft") open(view.at - 1);
  if (event.key === "ArrowRight") open(view.at + 1);
});
compare("side");
slide();
await refresh();
await recall();
setInterval(() => document.hidden || byId("viewer").open || refresh(), POLL_MS);
