"""What a Space of the Hub runs: the page of one model. README.md beside it says how to make a Space."""

from tprl_hf.app.asking import Asker
from tprl_hf.app.page import launch, make_page
from tprl_hf.loading import load_model

MODEL = None  # a TPRL checkpoint or any LVLM on the Hub, such as "me/llava-tprl"; None is the embedded model

if __name__ == "__main__":
    model, processor = load_model(MODEL)
    page = make_page(Asker(model, processor, MODEL or "The embedded model"))
    launch(page)  # at the address that the Space's environment names
    page.block_thread()
