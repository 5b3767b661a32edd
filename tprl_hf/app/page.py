"""The page itself: which field calls what. All that is computed lies in `asking`, all that is drawn in `cards`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tprl_hf.pictures import PictureError

from .asking import MAX_QUESTION, Asker, Refusal, Shown, fewest
from .cards import STYLE, answered_card, conversation_card, notice, steps_card, two_questions_card
from .drawing import frames_picture
from .examples import example_scenes

MOST_PRUNERS = 4  # at once
MOST_STEPS = 6
MAX_FILE_MB = 20
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# Nothing is fetched from elsewhere: fonts are the reader's own.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
MODEL_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
PAGE_STYLE = (
    STYLE
    + """
footer, #problem:not(:has(.tprl)) { display: none !important; }
.gradio-container { max-width: 82rem !important; }
"""
)


def make_page(asker: Asker) -> gr.Blocks:
    """The page of one model."""
    examples = example_scenes()
    folder = Path(tempfile.mkdtemp(prefix="tprl-app-"))
    files = []
    for number, example in enumerate(examples, start=1):
        files.append(str(folder / f"example {number}.png"))
        example.image.save(files[-1])
    num_visual = asker.count_visual(examples[0].image)
    own, choices, own_steps = asker.default_pruner(), asker.pruners, asker.model.config.num_steps

    with gr.Blocks(title=f"{asker.name}: kept tokens", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Which visual tokens does an answer need?\n**{asker.name}** ({asker.describe()}) answers with all "
            "visual tokens of a picture, and with those that a pruner keeps. The LLM does not see the others."
        )
        file, tokens, said = gr.State(files[0]), gr.State(num_visual), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    files[0],
                    label="Picture" if asker.why_no_videos else "Picture, or the frames of a video",
                    type="filepath",
                    format="png",
                    image_mode=None,
                    interactive=False,
                    height=300,
                    buttons=[],
                    elem_id="picture",
                )
                upload = gr.UploadButton(
                    "Upload a picture" if asker.why_no_videos else "Upload a picture or a short video",
                    file_types=["image", "video"],  # whoever sends a video is told where it is not read
                    elem_id="upload",
                )
                problem = gr.HTML(elem_id="problem")
                scenes = gr.Dataset(
                    components=["image"],
                    samples=[[file] for file in files],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
                keep = gr.Slider(
                    fewest(num_visual),
                    num_visual,
                    value=asker.default_keep(num_visual),
                    step=1,
                    elem_id="keep",
                    label=keep_label(num_visual),
                )
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Ask", id="ask"):
                    question = gr.Textbox(examples[0].question, label="Question", max_length=MAX_QUESTION)
                    pruners = gr.Dropdown(
                        choices,
                        value=[own],
                        multiselect=True,
                        max_choices=MOST_PRUNERS,
                        label="Pruners",
                        info=f"up to {MOST_PRUNERS}, beside the unpruned model",
                    )
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    answered = gr.HTML(elem_id="answered")
                with gr.Tab("Two questions", id="two"):
                    with gr.Row():
                        first = gr.Textbox(examples[0].question, label="First question", max_length=MAX_QUESTION)
                        second = gr.Textbox(
                            examples[0].other_question, label="Second question", max_length=MAX_QUESTION
                        )
                    two_pruner = gr.Dropdown(choices, value=own, label="Pruner")
                    ask_two = gr.Button("Ask both", variant="primary", elem_id="ask-two")
                    both = gr.HTML(elem_id="both")
                with gr.Tab("Chat", id="talk"):
                    talk = gr.HTML(elem_id="talk")
                    turn = gr.Textbox(label="Your turn", max_length=MAX_QUESTION, elem_id="turn")
                    talk_pruner = gr.Dropdown(choices, value=own, label="Pruner")
                    with gr.Row():
                        say = gr.Button("Say", variant="primary", elem_id="say")
                        again = gr.Button("New conversation", elem_id="again")
                step_fields = []
                if asker.has_policy():
                    with gr.Tab("Steps", id="steps"):
                        step_question = gr.Textbox(examples[0].question, label="Question", max_length=MAX_QUESTION)
                        num_steps = gr.Slider(
                            1,
                            max(MOST_STEPS, own_steps),
                            value=max(3, own_steps),
                            step=1,
                            label=f"Steps T (generate takes {own_steps})",
                        )
                        show_steps = gr.Button("Show the steps", variant="primary", elem_id="show")
                        steps = gr.HTML(elem_id="steps")
                        step_fields = [step_question]

        def show(what: Shown, drawn: Any, source: str, number: int, before: int) -> tuple[Any, ...]:
            """The slider follows the number of tokens of what is shown; a conversation about another picture ends."""
            count = asker.count_visual(what)
            low = fewest(count)
            value = min(max(low, round(number * count / before)), count)
            return drawn, source, gr.Slider(low, count, value=value, label=keep_label(count)), count, "", [], ""

        def on_upload(sent: str, number: int, before: int) -> tuple[Any, ...]:
            try:
                what = asker.read(sent)
                if not isinstance(what, Image.Image):
                    drawn: Any = frames_picture(what.frames)
                else:
                    drawn = sent if Path(sent).suffix.lower() in SHOWN_BY_BROWSERS else what
                return show(what, drawn, sent, number, before)
            except (Refusal, PictureError) as error:
                told_why = notice(f"{error} The picture above stays.")
                return gr.skip(), gr.skip(), gr.skip(), before, told_why, gr.skip(), gr.skip()

        def on_ask(file: str | None, text: str, names: list[str], number: int) -> str:
            return answered_card(asker.ask(asker.read(file), text, names, number))

        def on_two(file: str | None, one: str, other: str, name: str, number: int) -> str:
            return two_questions_card(*asker.two_questions(asker.read(file), (one, other), name, number))

        def on_say(
            file: str | None, turns: list[tuple[str, str, str]], text: str, name: str, number: int
        ) -> tuple[str, list[tuple[str, str, str]], str]:
            try:
                replies = asker.say(asker.read(file), turns, text, name, number)
            except (Refusal, PictureError) as error:
                return conversation_card(turns) + notice(str(error)), turns, text
            turns = [*turns, (text, replies[0].answer, replies[1].answer)]
            return conversation_card(turns, replies), turns, ""

        def on_steps(file: str | None, text: str, number: int, count: int) -> str:
            return steps_card(*asker.steps(asker.read(file), text, number, count))

        def on_example(chosen: int, number: int, before: int) -> tuple[Any, ...]:
            example = examples[chosen]
            texts = [example.question, example.question, example.other_question]
            return (
                *show(example.image, files[chosen], files[chosen], number, before),
                *texts,
                *([example.question] if step_fields else []),
            )

        shown = [picture, file, keep, tokens, problem, said, talk]
        upload.upload(on_upload, [upload, keep, tokens], shown, **MODEL_QUEUE)
        scenes.click(
            on_example, [scenes, keep, tokens], [*shown, question, first, second, *step_fields], **MODEL_QUEUE
        )
        gr.on([ask.click, question.submit], told(on_ask), [file, question, pruners, keep], answered, **MODEL_QUEUE)
        ask_two.click(told(on_two), [file, first, second, two_pruner, keep], both, **MODEL_QUEUE)
        gr.on(
            [say.click, turn.submit],
            on_say,
            [file, said, turn, talk_pruner, keep],
            [talk, said, turn],
            **MODEL_QUEUE,
        )
        again.click(lambda: ("", []), None, [talk, said])
        if asker.has_policy():
            gr.on(
                [show_steps.click, step_question.submit],
                told(on_steps),
                [file, step_question, keep, num_steps],
                steps,
                **MODEL_QUEUE,
            )
    return page


def keep_label(num_visual: int) -> str:
    return f"Visual tokens kept, of {num_visual}"


def told(answer: Callable[..., str]) -> Callable[..., str]:
    """The same function, which says what a person has to change in a sentence."""

    def call(*arguments: Any) -> str:
        try:
            return answer(*arguments)
        except (Refusal, PictureError) as error:
            return notice(str(error))

    return call


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """
    Starts to serve a page, without any connection to elsewhere.

    Args:
        page (`gr.Blocks`): From [`make_page`].
        host (`str`, *optional*), port (`int`, *optional*): By default where gradio's environment variables say, as
            in a Space.

    Returns:
        `str`: Its address.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=f"{MAX_FILE_MB}mb",
        theme=gr.themes.Default(**FONTS),
        css=PAGE_STYLE,
    )
    return address
