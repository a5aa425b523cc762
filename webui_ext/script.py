"""The script that A1111, Forge, Forge Neo and reForge run: attach, detach, report."""

from __future__ import annotations

import logging
from typing import Any

from modules import scripts

from tenuto.errors import TenutoError
from tenuto.resources import __version__

from . import accordion, artifacts
from .choices import PREDICTED, Choices, infotext
from .options import option
from .session import session
from .words import under_picture

log = logging.getLogger("tenuto")


class TenutoScript(scripts.Script):
    """Between the hooks nothing of Tenuto's is in the model. No hook stops an image."""

    sorting_priority = 15

    def title(self) -> str:
        """Its name, in the API too."""
        return "Tenuto"

    def show(self, is_img2img: bool) -> Any:
        """In both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The accordion."""
        return accordion.build(self)

    def before_process(self, p: Any, *args: Any) -> None:
        """A call whose sampling raised never came to its `postprocess`."""
        session.begin()

    def process(self, p: Any, *args: Any) -> None:
        """The infotext."""
        try:
            choices = self.choices(p, args)
            if choices.enabled and option("infotext"):
                found = artifacts.find(choices.artifact)
                scheme = artifacts.scheme_of(choices.artifact)
                made = infotext(choices, scheme, artifacts.mark(found), __version__)
                p.extra_generation_params.update(made)
        except Exception as error:  # attaching says it to the user
            log.debug("Tenuto writes no infotext: %s", error)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """A sampling pass begins; LoRAs are known from here on."""
        try:
            session.start(p, self.choices(p, args))
        except Exception as error:
            session.stop()
            say(error)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        """Before the VAE, the infotext, and what other extensions sample after this."""
        soft(session.stop, p)
        if session.report.predicted and option("infotext"):
            said = " ".join(s.removeprefix("Predicted: ") for s in session.report.predicted)
            p.extra_generation_params[PREDICTED] = said.rstrip(".")

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """The line under the image."""
        soft(session.stop, p)
        report = session.report
        if report.attached or report.notes:
            processed.comments = f"{processed.comments or ''}\n{under_picture(report)}"

    def choices(self, p: Any, args: tuple[Any, ...]) -> Choices:
        """What was chosen, for the tab that it is."""
        found = Choices.of(args, p)
        if getattr(self, "is_img2img", False) and not option("img2img"):
            return Choices()
        return found


def soft(call: Any, *args: Any) -> None:
    """`call`, whose failure is a sentence in the log and not the end of an image."""
    try:
        call(*args)
    except Exception as error:
        say(error)


def say(error: Exception) -> None:
    """One sentence in the log and under the image; the cause, where it is none of ours."""
    text = f"{error}" if isinstance(error, TenutoError) else f"{type(error).__name__}: {error}"
    log.warning("Tenuto: %s The image is made in full precision.", text)
    log.debug("Tenuto: the cause", exc_info=error)
    session.report.notes.append(f"{text.rstrip('.')}: the image is made in full precision")
