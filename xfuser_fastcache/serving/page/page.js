// The page in front of POST /generate: asks, follows the events, shows picture and decisions.
"use strict";

const $ = (id) => document.getElementById(id);
let running = null; // the AbortController of what is being drawn

async function greet() {
  const answer = await fetch("health");
  const about = await answer.json();
  const layout = Object.entries(about.parallel ?? {}).filter(([, n]) => n > 1);
  const ranks = about.ranks > 1 ? `${about.ranks} ranks` : "1 rank";
  const said = [about.model, ranks, ...layout.map(([name, n]) => `${name} ${n}`)];
  said.push(about.use_cache ? `cache ${about.use_cache}` : "no cache of its own", about.status);
  $("service").textContent = said.join(" · ");
  const { defaults, limits } = about;
  $("width").value = defaults.width;
  $("height").value = defaults.height;
  $("width").max = $("height").max = limits.max_side;
  $("width").step = $("width").min = limits.width_multiple;
  $("height").step = $("height").min = limits.height_multiple;
  $("steps").value = defaults.num_inference_steps;
  $("steps").max = limits.max_steps;
  $("prompt").maxLength = limits.max_prompt_length;
  fit();
  $("budget").value = Math.ceil($("steps").value / 2);
  fit();
}

// The budget goes to as many steps as there are.
function fit() {
  $("budget").max = $("steps").value || 1;
  $("budget-said").textContent = `${$("budget").value} of ${$("budget").max}`;
  $("budget-row").hidden = $("cache").value !== "budget";
}

function wanted() {
  const body = {
    prompt: $("prompt").value,
    width: Number($("width").value),
    height: Number($("height").value),
    num_inference_steps: Number($("steps").value),
    // Both pictures of a comparison begin with the same noise.
    seed: $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0]
      : Number($("seed").value),
    stream: true,
  };
  if ($("cache").value === "none") body.use_cache = false;
  if ($("cache").value === "budget") {
    body.use_cache = "Fast";
    body.cache_config = { computed_steps: Number($("budget").value) };
  }
  return body;
}

// Yields [word, body] of each server-sent event.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [word, data] = part.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      yield [word, JSON.parse(data)];
    }
  }
}

function card(title) {
  const made = $("card").content.cloneNode(true).firstElementChild;
  made.querySelector("h2").textContent = title;
  $("pictures").append(made);
  return made;
}

async function draw(body, title, signal) {
  const shown = card(title);
  const state = shown.querySelector(".state");
  const bar = shown.querySelector("progress");
  state.textContent = "sent";
  try {
    const answer = await fetch("generate", {
      method: "POST", signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    for await (const [word, told] of events(answer)) {
      if (word === "waiting") state.textContent = `waiting, ${told.ahead} ahead`;
      if (word === "progress") {
        bar.value = told.step / told.steps;
        state.textContent = `step ${told.step} of ${told.steps}, `
          + `${Math.round(100 * told.block_approx_ratio)} % of the blocks skipped`;
      }
      if (word === "error") throw new Error(told.detail);
      if (word === "done") {
        await show(shown, told);
        return { shown, told };
      }
    }
    throw new Error("the service ended the connection");
  } catch (error) {
    state.textContent = error.name === "AbortError" ? "cancelled" : "failed";
    throw error;
  } finally {
    bar.remove();
  }
}

async function show(shown, drawn) {
  const picture = shown.querySelector("img");
  picture.src = `data:image/${drawn.output_format};base64,${drawn.image}`;
  picture.alt = `${$("prompt").value}, seed ${drawn.seed}`;
  const skipped = drawn.statistics.block_approx_ratio ?? 0;
  shown.querySelector(".state").textContent = `seed ${drawn.seed}, ${drawn.seconds.toFixed(2)} s, `
    + `${Math.round(100 * skipped)} % of the blocks skipped`;
  const rows = shown.querySelector(".steps");
  for (const row of drawn.decisions) {
    const line = document.createElement("li");
    for (const letter of row.steps) {
      const step = document.createElement("i");
      if ("csf".includes(letter)) step.className = letter;
      line.append(step);
    }
    line.title = `branch ${row.branch}, ${row.first_block} to ${row.last_block}`;
    rows.append(line);
  }
  if (!drawn.decisions.length) shown.querySelector(".legend").remove();
  shown.querySelector("pre").textContent = JSON.stringify(drawn.statistics, null, 1);
  await picture.decode();
}

function pixels(picture) {
  const board = document.createElement("canvas");
  board.width = picture.naturalWidth;
  board.height = picture.naturalHeight;
  const pen = board.getContext("2d");
  pen.drawImage(picture, 0, 0);
  return pen.getImageData(0, 0, board.width, board.height).data;
}

// PSNR of two pictures' colours, in dB.
function psnr(one, other) {
  const [a, b] = [one, other].map((it) => pixels(it.querySelector("img")));
  let sum = 0;
  for (let i = 0; i < a.length; i++) if (i % 4 < 3) sum += (a[i] - b[i]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / (a.length * 0.75)));
}

async function ask(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  $("draw").disabled = true;
  $("cancel").disabled = false;
  $("said").textContent = "";
  $("pictures").replaceChildren();
  try {
    const body = wanted();
    const named = body.use_cache === false ? "without a cache" : "cached";
    const found = await draw(body, named, running.signal);
    if ($("compare").checked && body.use_cache !== false) {
      const { cache_config: _, ...rest } = body;
      const plain = await draw({ ...rest, use_cache: false }, "uncached", running.signal);
      const decibel = psnr(found.shown, plain.shown);
      const times = plain.told.seconds / found.told.seconds;
      found.shown.querySelector("h2").textContent = `cached: ${times.toFixed(2)} times as fast, `
        + (Number.isFinite(decibel) ? `${decibel.toFixed(1)} dB` : "the very same picture");
    }
  } catch (error) {
    if (error.name !== "AbortError") $("said").textContent = error.message;
  } finally {
    running = null;
    $("draw").disabled = false;
    $("cancel").disabled = true;
  }
}

$("wanted").addEventListener("submit", ask);
$("cancel").addEventListener("click", () => running?.abort());
for (const id of ["steps", "budget", "cache"]) $(id).addEventListener("input", fit);
greet().catch((error) => { $("said").textContent = error.message; });
