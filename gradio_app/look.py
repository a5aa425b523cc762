"""How the app looks: colours of enough contrast, light and dark, and fonts of the machine."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLE = Path(__file__).with_name("style.css")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's own, with darker words: every text has the contrast that WCAG AA asks for."""
    return gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO).set(
        block_title_text_color="*primary_800",
        block_label_text_color="*primary_800",
        block_title_text_color_dark="*primary_200",
        block_label_text_color_dark="*primary_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#991b1b",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
