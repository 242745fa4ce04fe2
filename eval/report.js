"use strict";
// Everything here reads attributes that the page writes; nothing is fetched and no text becomes markup.

const answers = [...document.querySelectorAll(".answer")];

// A 16-bit mono WAV holding the samples of `wav` between two times: what the model heard again.
function cut(wav, startS, endS) {
  const view = new DataView(wav.buffer);
  const rate = view.getUint32(24, true);
  let at = 12;
  while (String.fromCharCode(...wav.subarray(at, at + 4)) !== "data") at += 8 + view.getUint32(at + 4, true);
  const size = view.getUint32(at + 4, true);
  const begin = Math.min(size, 2 * Math.round(startS * rate));
  const end = Math.min(size, 2 * Math.round(endS * rate));
  const head = wav.slice(0, at + 8);
  const headView = new DataView(head.buffer);
  headView.setUint32(4, at + end - begin, true);
  headView.setUint32(at + 4, end - begin, true);
  return new Blob([head, wav.subarray(at + 8 + begin, at + 8 + end)], { type: "audio/wav" });
}

for (const answer of answers) {
  const clip = answer.querySelector("audio.clip");
  const head = answer.querySelector(".head");
  const duration = Number(answer.dataset.duration);
  const text = atob(clip.src.slice(clip.src.indexOf(",") + 1));
  const wav = Uint8Array.from(text, (byte) => byte.charCodeAt(0));
  for (const player of answer.querySelectorAll("audio.segment")) {
    player.src = URL.createObjectURL(cut(wav, Number(player.dataset.start), Number(player.dataset.end)));
  }
  let stopAt = Infinity;
  let playing = null;
  const settle = () => {
    if (playing) playing.classList.remove("playing");
    playing = null;
    stopAt = Infinity;
  };
  const follow = () => {
    const x = (100 * clip.currentTime) / duration;
    head.setAttribute("x1", x);
    head.setAttribute("x2", x);
    if (clip.currentTime >= stopAt) {
      clip.pause();
      settle();
    }
    if (!clip.paused) requestAnimationFrame(follow);
  };
  clip.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== clip) other.pause();
    requestAnimationFrame(follow);
  });
  clip.addEventListener("seeked", follow);
  clip.addEventListener("ended", settle);
  for (const link of answer.querySelectorAll("a[data-start]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      settle();
      clip.currentTime = Number(link.dataset.start);
      stopAt = Number(link.dataset.end);
      playing = link;
      link.classList.add("playing");
      clip.play();
    });
  }
  answer.querySelector(".picture").addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    settle();
    clip.currentTime = (duration * (event.clientX - box.left)) / box.width;
    clip.play();
  });
}

const filters = document.querySelector(".filters");
if (filters) {
  filters.addEventListener("change", () => {
    const verdict = filters.querySelector("input:checked").value;
    const kind = filters.querySelector("select").value;
    let shown = 0;
    for (const answer of answers) {
      answer.hidden = !(
        (verdict === "all" || answer.dataset.verdict === verdict) &&
        (kind === "all" || answer.dataset.kind === kind)
      );
      shown += !answer.hidden;
    }
    filters.querySelector("output").textContent = `${shown} shown`;
  });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
  const shown = answers.filter((answer) => !answer.hidden);
  const current = shown.findIndex((answer) => answer.contains(document.activeElement));
  const target = { j: shown[current + 1], k: shown[Math.max(0, current - 1)] }[event.key];
  if (target) {
    target.focus();
    target.scrollIntoView({ block: "start" });
  }
});
