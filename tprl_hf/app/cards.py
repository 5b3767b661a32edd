"""What the page shows of a reply, as HTML: words, bars and pictures. Every text of a person or a model is escaped."""

import html
import math
from collections.abc import Sequence

from tprl_hf.evaluation.trajectory import TrajectoryStep
from tprl_hf.style import BLUE, ORANGE, SKY
from tprl_hf.visualization import Figure

from .asking import ROUNDS, Answered, Reply
from .drawing import HEAT, as_address, heat_picture, kept_picture, score_range

# Light against dark, so that they differ without colours too.
BEFORE_LLM, IN_LLM = SKY, BLUE
_SCALE = ", ".join(f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in HEAT)
# Its variables are gradio's, which follow the light and the dark theme.
STYLE = f"""
.tprl {{ color: var(--body-text-color); font-size: 15px; line-height: 1.45;
  --quiet: color-mix(in srgb, var(--body-text-color) 75%, transparent); }}
.tprl h3 {{ font-size: 1.05rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }}
.tprl h3:first-child {{ margin-top: 0; }}
.tprl p {{ margin: .3rem 0; overflow-wrap: anywhere; }}
.tprl .small {{ color: var(--quiet); font-size: 13px; }}
.tprl .notice {{ border-left: 4px solid {ORANGE}; padding: .4rem .7rem;
  background: var(--background-fill-secondary); }}
.tprl table {{ border-collapse: collapse; width: 100%; }}
.tprl table, .tprl thead, .tprl tbody, .tprl tr {{ border: 0 !important; }}
.tprl th, .tprl td {{ text-align: left; padding: .35rem .6rem .35rem 0 !important; vertical-align: top;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; overflow-wrap: break-word; }}
.tprl th {{ font-weight: 600; font-size: 13px; color: var(--quiet); }}
.tprl .answer {{ font-weight: 600; overflow-wrap: anywhere; }}
.tprl .bars {{ display: grid; grid-template-columns: minmax(5.5em, max-content) 1fr max-content; gap: .3rem .6rem;
  align-items: center; }}
.tprl .track {{ display: flex; height: 1.1em; background: var(--background-fill-secondary); }}
.tprl .track span {{ display: block; height: 100%; }}
.tprl .axis {{ display: flex; justify-content: space-between; border-top: 1px solid var(--quiet); }}
.tprl .key {{ display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 0; vertical-align: -.1em; }}
.tprl .pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
  gap: .9rem; }}
.tprl .steps {{ grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }}
.tprl figure {{ margin: 0; max-width: 21rem; }}
.tprl figure img {{ width: 100%; height: auto; display: block; margin: 0; border-radius: 3px; }}
.tprl figcaption {{ font-size: 13px; color: var(--quiet); padding: .25rem 0; }}
.tprl .scale {{ display: grid; grid-template-columns: max-content 1fr max-content; gap: .5em; align-items: center; }}
.tprl .scale i {{ display: block; height: .7em; background: linear-gradient(to right, {_SCALE}); }}
.tprl .two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; }}
.tprl .said {{ background: var(--background-fill-secondary); border-radius: 8px; padding: .5rem .8rem; }}
.tprl .two .pictures {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); margin-top: .8rem; }}
.tprl .turn {{ margin: 0 0 1rem; }}
.tprl .turn .two p {{ margin: 0; }}
.tprl .turn > .said {{ margin: 0 0 .5rem 15%; }}
.tprl .turn .two {{ gap: .6rem; }}
.tprl .turn .two .said {{ background: none; border: 1px solid var(--border-color-primary); }}
@media (max-width: 40rem) {{ .tprl .two {{ grid-template-columns: 1fr; }} .tprl table {{ font-size: 14px; }}
  .tprl .pictures, .tprl .two .pictures {{ grid-template-columns: 1fr 1fr; }}
  .tprl .turn .two {{ grid-template-columns: 1fr 1fr; }} }}
"""


def notice(text: str) -> str:
    """A sentence for the person who asked, in place of a reply."""
    return f'<div class="tprl"><p class="notice" role="alert">{html.escape(text)}</p></div>'


def answered_card(answered: Answered) -> str:
    """One question under all chosen pruners: answers, bars, and where the kept tokens lie."""
    parts = [_note(answered.note), answers_table(answered.replies), time_bars(answered.replies)]
    for reply in answered.replies[1:]:
        parts.append(f"<h3>{html.escape(reply.pruner)} keeps {_count(reply)} visual tokens</h3>")
        parts.append(pictures_of(reply))
    return f'<div class="tprl">{"".join(parts)}</div>'


def two_questions_card(answered: Sequence[Answered], num_both: int) -> str:
    """Two questions beside each other, and how many tokens are kept for both."""
    columns = ""
    for one in answered:
        columns += f"<div><h3>{html.escape(one.question)}</h3>{_note(one.note)}{answers_table(one.replies)}"
        columns += f"{pictures_of(one.replies[1])}</div>"
    kept = int(answered[0].replies[1].kept.sum())
    both = (
        f"<p><b>{num_both} of the {kept}</b> tokens that are kept for the first question are kept for the second.</p>"
    )
    return f'<div class="tprl"><div class="two">{columns}</div>{both}</div>'


def conversation_card(turns: Sequence[tuple[str, str, str]], replies: Sequence[Reply] = ()) -> str:
    """All turns, each with both answers, and the pictures of the last one."""
    parts = []
    for question, whole, pruned in turns:
        answers = f'<p class="said"><span class="small">unpruned</span><br>{_answer(whole)}</p>'
        answers += f'<p class="said"><span class="small">pruned</span><br>{_answer(pruned)}</p>'
        parts.append(
            f'<div class="turn"><p class="said">{html.escape(question)}</p><div class="two">{answers}</div></div>'
        )
    if replies:
        full, kept = replies
        parts.append(
            f'<p class="small">In the last turn the LLM read {full.num_read} tokens, and {kept.num_read} with '
            f"{_count(kept)} visual tokens. {html.escape(kept.pruner)} chose them for the last question:</p>"
        )
        parts.append(pictures_of(kept))
    return f'<div class="tprl">{"".join(parts)}</div>'


def steps_card(steps: Sequence[TrajectoryStep], figures: Sequence[Figure]) -> str:
    """The states of the policy from left to right."""
    shown = ""
    for number, step in enumerate(steps):
        title = "before the first step" if number == 0 else f"after step {number} of {len(steps) - 1}"
        caption = f"<b>{title}</b><br>{step.num_kept} tokens<br>{_answer(step.answer)}"
        caption += f"<br>score {f'{step.score:.3f}'.replace('-', '−')} nats"
        pictures = "".join(
            _picture(kept_picture(figure, number), f"{step.num_kept} kept tokens {title}, drawn over the picture")
            for figure in figures
        )
        shown += f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"
    rows = ""
    for number, step in enumerate(steps):
        if step.probs is not None:
            heat = "".join(
                _picture(heat_picture(figure, 0, 1, number), f"keep probabilities in step {number}")
                for figure in figures
            )
            rows += f"<figure>{heat}<figcaption>in step {number}</figcaption></figure>"
    reference = html.escape(steps[0].answer)
    return (
        f'<div class="tprl"><div class="pictures steps">{shown}</div>'
        f'<p class="small">Score: mean log-probability of the tokens of “{reference}”, the answer with all tokens; '
        f"0 is certain.</p><h3>Keep probability of each token</h3>{_scale(0, 1)}"
        f'<div class="pictures steps">{rows}</div>'
        '<p class="small">Tokens that an earlier step removed have 0.</p></div>'
    )


def answers_table(replies: Sequence[Reply]) -> str:
    """A row for each pruner: answer, visual tokens, and all tokens that the LLM read."""
    rows = ""
    for reply in replies:
        name = _named(reply)
        rows += f'<tr><td>{name}</td><td class="answer">{_answer(reply.answer)}{_differs(reply, replies[0])}</td>'
        rows += f"<td>{_count(reply)}</td><td>{reply.num_read}</td></tr>"
    return (
        "<table><thead><tr><th>pruner</th><th>answer</th><th>visual tokens</th><th>tokens in all</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def time_bars(replies: Sequence[Reply]) -> str:
    """Bars from 0: what was measured until the first word, in two parts."""
    longest = nice_end(max(reply.time.total_ms for reply in replies if reply.time is not None))
    bars = ""
    for reply in replies:
        assert reply.time is not None
        before, inside = reply.time.total_ms - reply.time.llm_ms, reply.time.llm_ms
        name = _named(reply)
        tip = f"vision tower and pruner {_ms(before)}, LLM {_ms(inside)}"
        bars += f'<div>{name}</div><div class="track" role="img" aria-label="{tip}" title="{tip}">'
        for part, colour in ((before, BEFORE_LLM), (inside, IN_LLM)):
            bars += f'<span style="width: {100 * part / longest:.2f}%; background: {colour}"></span>'
        bars += f"</div><div>{_ms(reply.time.total_ms)}</div>"
    ticks = "".join(f"<span>{longest * share:g}</span>" for share in (0, 0.5, 1))
    keys = (
        f'<span class="key" style="background: {BEFORE_LLM}"></span>vision tower and pruner &ensp;'
        f'<span class="key" style="background: {IN_LLM}"></span>LLM'
    )
    return (
        f'<h3>Time until the first word</h3><p class="small">{keys}</p><div class="bars">{bars}'
        f'<div></div><div class="axis small">{ticks}</div><div class="small">ms</div></div>'
        f'<p class="small">Measured just now: medians of {ROUNDS} rounds in which all take turns.</p>'
    )


def pictures_of(reply: Reply) -> str:
    """What a pruner keeps, beside what its choice followed, for each grid of tokens."""
    named = html.escape(reply.pruner)
    shown = ""
    low, high = score_range(reply.figures, reply.meaning) if reply.meaning else (0.0, 0.0)
    for number, figure in enumerate(reply.figures):
        lines = ["Kept tokens over what the vision tower saw; hatched ones are removed."] if number == 0 else []
        lines += [html.escape(figure.title.strip())] if figure.title else []
        caption = "<br>".join(lines)
        shown += _figure(_picture(kept_picture(figure), f"Tokens that {named} keeps, over the picture"), caption)
        if reply.meaning:
            what = "Keep probability" if reply.meaning == "probability" else f"Score, on the scale of {named}"
            heat = _picture(heat_picture(figure, low, high), f"{what} of each token, as colours")
            shown += _figure(heat, f"{what} of each token{_scale(low, high)}")
    if not reply.meaning:
        shown += f'<p class="small">{named} chooses tokens together: single tokens have no score to draw.</p>'
    return f'<div class="pictures">{shown}</div>'


def nice_end(value: float) -> float:
    """The end of an axis: a short number that is not less than `value`."""
    power = 10 ** math.floor(math.log10(max(value, 1e-3)))
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * step >= value)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def _named(reply: Reply) -> str:
    return "unpruned" if reply.pruner == "none" else html.escape(reply.pruner)


def _count(reply: Reply) -> str:
    return f"{reply.num_kept} of {reply.num_visual}"


def _answer(text: str) -> str:
    return html.escape(text) or "(no word)"


def _differs(reply: Reply, full: Reply) -> str:
    if reply is full:
        return ""
    return (
        ' <span class="small">= same</span>' if reply.answer == full.answer else ' <span class="small">≠ other</span>'
    )


def _note(text: str | None) -> str:
    return "" if text is None else f'<p class="notice">{html.escape(text)}</p>'


def _picture(drawing, alt: str) -> str:
    return f'<img src="{as_address(drawing)}" alt="{alt}">'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _scale(low: float, high: float) -> str:
    return f'<span class="scale"><span>{low:.3g}</span><i></i><span>{high:.3g}</span></span>'
