// The page: strokes or a photo on the paper; what the server reads in them beside it.

const SIDE = 280; // pixels of the picture that is sent
const PEN = 0.065; // width of a stroke, as a share of the paper's side
const SMALL_BYTES = 2 ** 20; // a photo that is sent as it is
const LOOK_SIDE = 1536; // pixels; the server looks no closer
const KNOWN = /^image\/(png|jpeg|bmp|webp|tiff|gif)$/; // what the server opens
const PAUSE_MS = 60; // between two questions
const RETRY_MS = 1500;
const PALM_MS = 1000; // so soon after a pen, what touches is a palm
const SPEAK_MS = 900; // a screen reader speaks when the hand has rested so long

const $ = (id) => document.getElementById(id);
const paper = $("paper");
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// --- what is on the paper ----------------------------------------------------------------------------------------------

// A photo, or strokes: arrays of points {x, y, width}, all shares of the paper's side. Never changed, but replaced.
const BLANK = { photo: null, strokes: [] };
let sheet = BLANK;
let past = []; // earlier sheets, for undo
let edits = 0; // counts what was done to the paper
let stroke = null; // under the hand
let hand = null; // the pointer that draws it; another, such as the palm beside a pen, draws nothing
let penTime = -Infinity; // when a pen was here last

const isBlank = () => !sheet.photo && !sheet.strokes.length && !stroke;

function change(next) {
  edits += 1;
  past.push(sheet);
  sheet = next;
  show();
}

function undo() {
  if (!past.length || stroke) return;
  edits += 1;
  sheet = past.pop();
  turnPage();
}

function clear() {
  edits += 1; // also for a photo that is still being opened
  if (isBlank()) return showEmpty();
  stroke = null;
  change(BLANK);
  turnPage();
}

/** Something else is on the paper: answers about what was there before are of no interest. */
function turnPage() {
  reader.forget();
  show();
  if (isBlank()) showEmpty();
  else reader.ask();
}

function show() {
  draw();
  $("sheet").classList.toggle("inked", !isBlank());
  $("undo").disabled = !past.length;
  $("clear").disabled = isBlank();
}

// --- drawing -----------------------------------------------------------------------------------------------------------

function drawStroke(pen, points, side) {
  pen.lineCap = pen.lineJoin = "round";
  let [x, y] = [points[0].x * side, points[0].y * side];
  pen.beginPath();
  pen.moveTo(x, y);
  points.forEach((point, i) => {
    if (point.width * side !== pen.lineWidth) {
      if (i) pen.stroke();
      pen.lineWidth = point.width * side;
      pen.beginPath();
      pen.moveTo(x, y);
    }
    // From the middle of one pair of points to the middle of the next: smooth where the hand was sampled coarsely.
    const after = points[i + 1] ?? point;
    [x, y] = [((point.x + after.x) / 2) * side, ((point.y + after.y) / 2) * side];
    pen.quadraticCurveTo(point.x * side, point.y * side, x, y);
  });
  if (points.length === 1) pen.lineTo(x + 0.01, y); // a dot: a line of no length is not drawn
  pen.stroke();
}

function drawStrokes(pen, side) {
  for (const points of stroke ? [...sheet.strokes, stroke] : sheet.strokes) drawStroke(pen, points, side);
}

function draw() {
  const sharpness = Math.max(2, devicePixelRatio);
  const side = Math.round(paper.clientWidth * sharpness);
  if (!side) return;
  paper.width = paper.height = side; // this also clears it
  const pen = paper.getContext("2d");
  const text = getComputedStyle(paper).color;
  const picture = sheet.photo?.picture;
  if (picture) {
    const scale = side / Math.max(picture.width, picture.height);
    const [width, height] = [picture.width * scale, picture.height * scale];
    pen.fillStyle = "#888"; // where it is transparent, for dark ink and for bright
    pen.fillRect((side - width) / 2, (side - height) / 2, width, height);
    pen.drawImage(picture, (side - width) / 2, (side - height) / 2, width, height);
  } else if (sheet.photo) {
    pen.fillStyle = text;
    pen.font = `${16 * sharpness}px system-ui`;
    pen.textAlign = "center";
    pen.fillText(sheet.photo.file.name || "a picture", side / 2, side / 2, side * 0.9);
  }
  pen.strokeStyle = text;
  drawStrokes(pen, side);
}

/** The strokes in black on white, whatever the colours of the page. */
function drawingAsPng() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.strokeStyle = "#000";
  drawStrokes(pen, SIDE);
  // Not toBlob: Chromium waits with that until the page is idle, up to a second, longer on a slow phone.
  const bytes = atob(canvas.toDataURL("image/png").split(",")[1]);
  return new Blob([Uint8Array.from(bytes, (byte) => byte.charCodeAt(0))], { type: "image/png" });
}

function pointAt(event) {
  const box = paper.getBoundingClientRect();
  const pressed = event.pointerType === "pen" && event.pressure > 0 ? 0.6 + 0.1 * Math.round(8 * event.pressure) : 1;
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height, width: PEN * pressed };
}

paper.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  if (stroke && (hand.type === "pen" || event.pointerType !== "pen")) return; // a pen takes over from the palm
  if (event.pointerType === "touch" && event.timeStamp - penTime < PALM_MS) return;
  event.preventDefault();
  hand = { id: event.pointerId, type: event.pointerType };
  paper.setPointerCapture(event.pointerId);
  edits += 1;
  if (sheet.photo) {
    change(BLANK); // a new drawing
    turnPage();
  }
  stroke = [pointAt(event)];
  show();
  reader.ask();
});

paper.addEventListener("pointermove", (event) => {
  if (!stroke || event.pointerId !== hand.id) return;
  const events = event.getCoalescedEvents?.() ?? [];
  stroke.push(...(events.length ? events : [event]).map(pointAt));
  draw();
  reader.ask();
});

for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
  paper.addEventListener(name, (event) => {
    if (event.pointerType === "pen") penTime = event.timeStamp;
    if (!stroke || event.pointerId !== hand.id) return;
    const next = { photo: null, strokes: [...sheet.strokes, stroke] };
    stroke = null;
    change(next);
    reader.ask();
  });
}

// --- photos ------------------------------------------------------------------------------------------------------------

async function place(file) {
  if (!file) return;
  const before = ++edits;
  reader.forget();
  showSeen(null, []);
  if (!file.size) return showProblem("The file is empty.");
  showResult("empty", null, "Reading …", "", null);
  speak("Reading …");
  const bytes = await file.arrayBuffer().catch(() => null); // now: the file may change before it is sent again
  if (edits !== before) return;
  if (!bytes) return showProblem("The file cannot be read.");
  file = new File([bytes], file.name, { type: file.type });
  const picture = await createImageBitmap(file).catch(() => null); // null: perhaps the server can read it
  const sent = await shrink(file, picture);
  if (edits !== before) return; // something else was put on the paper meanwhile
  stroke = null;
  change({ photo: { file: sent, picture }, strokes: [] });
  turnPage();
}

/** A photo that is large, or of a kind that only the browser knows (AVIF, HEIC), as the server likes it. */
async function shrink(file, picture) {
  if (!picture) return file;
  const side = Math.max(picture.width, picture.height);
  if (file.size <= SMALL_BYTES && side <= 4096 && KNOWN.test(file.type)) return file;
  const scale = Math.min(1, LOOK_SIDE / side);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height].map((pixels) => Math.max(1, Math.round(pixels * scale)));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.9)); // where it is unknown, a PNG
}

for (const id of ["photo", "camera"]) {
  $(id).addEventListener("change", (event) => {
    place(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
}

addEventListener("paste", (event) => place(event.clipboardData?.files[0]));

for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop") place(event.dataTransfer?.files[0]);
  });
}

// --- asking the server -------------------------------------------------------------------------------------------------

/** Asks one question at a time, always about the latest picture, so that no old answer can follow a new one. */
const reader = {
  asked: 0, // counts what was drawn
  answered: 0, // the last of these that needs no more asking
  asking: false,
  stop: new AbortController(),

  forget() {
    this.stop.abort();
    this.stop = new AbortController();
    this.answered = this.asked;
  },

  async ask() {
    this.asked += 1;
    if (this.asking) return;
    this.asking = true;
    for (; this.answered !== this.asked && !isBlank(); await wait(PAUSE_MS)) {
      this.answered = this.asked;
      const { signal } = this.stop;
      try {
        const answer = await this.send(signal);
        if (!signal.aborted) showAnswer(answer);
      } catch (problem) {
        if (signal.aborted) continue;
        showProblem(problem.message);
        if (problem.passes) {
          await wait(RETRY_MS);
          if (!signal.aborted) this.answered -= 1; // once more
        }
      }
    }
    this.asking = false;
  },

  async send(signal) {
    const { photo } = sheet;
    const body = photo ? photo.file : drawingAsPng();
    const headers = { "Content-Type": "application/octet-stream" }; // the server looks for itself
    const url = photo ? "predict" : "predict?invert=yes";
    let response;
    try {
      response = await fetch(url, { method: "POST", body, headers, signal });
    } catch {
      throw Object.assign(new Error("The server does not answer. Is it still running?"), { passes: true });
    }
    const answer = await response.json().catch(() => ({}));
    if (response.ok) return answer;
    const problem = sentence(answer.error ?? `the server answered with error ${response.status}`);
    throw Object.assign(new Error(problem), { passes: response.status === 503 });
  },
};

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const sentence = (text) => capital(text) + (/[.?!]$/.test(text) ? "" : ".");

// --- showing the answer ------------------------------------------------------------------------------------------------

function percent(share) {
  if (share >= 0.9995) return "over 99.9\u00a0%";
  return `${(100 * share).toFixed(share < 0.0995 || share > 0.9895 ? 1 : 0)}\u00a0%`;
}

const a = (digit) => `${digit === 8 ? "an" : "a"} ${digit}`;

const bars = Array.from({ length: 10 }, (_, digit) => {
  const bar = document.createElement("li");
  bar.innerHTML = `<span class="percent"></span><span class="track"><span class="fill"></span></span>${digit}`;
  $("bars").append(bar);
  return bar;
});

function showResult(status, digit, verdict, detail, probabilities) {
  $("result").dataset.status = status;
  $("digit").textContent = digit ?? "";
  $("verdict").textContent = verdict;
  $("detail").textContent = detail;
  bars.forEach((bar, i) => {
    const share = probabilities?.[i] ?? 0;
    bar.classList.toggle("best", digit === i);
    bar.querySelector(".fill").style.setProperty("--share", share);
    bar.querySelector(".percent").textContent = share >= 0.005 ? Math.round(100 * share) : "";
  });
  const shares = probabilities?.map((share, i) => `${i}: ${percent(share)}`).join(", ");
  $("bars").setAttribute("aria-label", `Probability of each digit${shares ? `: ${shares}` : ""}`);
}

function showAnswer({ status, digit, confidence, runner_up, runner_up_confidence, probabilities, steps, image }) {
  const words = {
    ok: () => [
      capital(`${percent(confidence)} sure`),
      runner_up_confidence < 0.001 ? "nothing comes close" : `else ${a(runner_up)}, ${percent(runner_up_confidence)}`,
    ],
    uncertain: () => ["Uncertain", `perhaps ${a(digit)}, ${percent(confidence)}, or ${a(runner_up)}, ${percent(runner_up_confidence)}`],
    "no digit": () => ["No digit", "nothing here that looks like one"],
  };
  const [verdict, alone] = words[status]();
  const known = status !== "no digit";
  const others = steps.find((step) => known && step.includes("left out"));
  const doubt = others ? `; is it the only one? ${others}` : "";
  const detail = alone + doubt;
  showResult(status, known ? digit : null, verdict, detail, known ? probabilities : null);
  showSeen(image, steps);
  speak(status === "ok" ? `${digit}, ${verdict}${doubt}` : `${verdict}: ${detail}`);
}

function showEmpty() {
  showResult("empty", null, "Nothing yet", "Draw on the paper.", null);
  showSeen(null, []);
  speak("");
}

function showProblem(message) {
  showResult("error", null, "Not read", message, null);
  showSeen(null, []);
  speak(`Not read: ${message}`);
}

function showSeen(image, steps) {
  $("seen").hidden = !image;
  if (image) $("seen").src = `data:image/png;base64,${image}`;
  else $("seen").removeAttribute("src");
  $("steps").textContent = steps.length ? `${steps.join(", ")}.` : "Nothing yet.";
}

let speaking;
function speak(text) {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    if ($("spoken").textContent !== text) $("spoken").textContent = text;
  }, SPEAK_MS);
}

// --- keys, buttons, sizes, colours -------------------------------------------------------------------------------------

$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", clear);

addEventListener("keydown", (event) => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey) undo();
  else if (["Escape", "Delete", "Backspace"].includes(event.key)) clear();
  else return;
  event.preventDefault();
});

new ResizeObserver(draw).observe(paper);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
$("address").textContent = new URL(".", location.href);
showEmpty();
show();
