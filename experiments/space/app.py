"""The page of ``nvae explore`` on the model in the package, as a Hugging Face Space."""

from nvae_lightning import load_model
from nvae_lightning.data import MNIST5k
from nvae_lightning.explorer.page import build_page, serve
from nvae_lightning.explorer.workspace import Workspace

digits = MNIST5k()
digits.prepare_data()
digits.setup("test")
page = build_page(Workspace(load_model("mnist"), digits.test_set))

if __name__ == "__main__":
    serve(page, "0.0.0.0", 7860)
    page.block_thread()
