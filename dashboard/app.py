"""The dashboard: its pages and their order. Start it with `pocketfed dashboard --database fleet.db`."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

VIEWS = Path(__file__).resolve().with_name("views")
PAGES = (
    ("now", "Now", ":material/pulse_alert:"),
    ("learning", "Learning", ":material/trending_up:"),
    ("round", "Round", ":material/filter_alt:"),
    ("fleet", "Fleet", ":material/devices:"),
    ("models", "Models", ":material/deployed_code:"),
    ("security", "Security & privacy", ":material/shield:"),
    ("compare", "Compare", ":material/compare_arrows:"),
    ("system", "System", ":material/database:"),
)
# drawn here, because Streamlit would fetch the picture of an emoji or of a named icon from the web
MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32" fill="none" '
    'stroke="#2D7DD2" stroke-width="2.4">'
    '<path d="M16 16 6 8M16 16 26 8M16 16v11"/><circle cx="16" cy="16" r="4.2" fill="#2D7DD2"/>'
    '<circle cx="6" cy="8" r="3" fill="#fff"/><circle cx="26" cy="8" r="3" fill="#fff"/>'
    '<circle cx="16" cy="27" r="3" fill="#fff"/></svg>'
)
NAME = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 150 32" width="150" height="32">'
    + MARK.replace("<svg ", '<svg x="0" y="0" ', 1)
    + '<text x="40" y="22" font-family="sans-serif" font-size="19" font-weight="600" '
    'fill="#2D7DD2">pocketfed</text></svg>'
)


def main() -> None:
    st.set_page_config(
        page_title="pocketfed", page_icon=MARK, layout="wide", menu_items={"About": "pocketfed: a fleet at a glance"}
    )
    # Streamlit leaves six lines free above a page, and five characters beside it; a glance has no use for them
    free = "padding:3.2rem clamp(1rem,3vw,2.5rem) 3rem"
    st.html(f"<style>.stMainBlockContainer{{{free}}}</style>")
    st.logo(NAME, size="large", icon_image=MARK)
    pages = [
        st.Page(VIEWS / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "now")
        for name, title, icon in PAGES
    ]
    st.navigation(pages).run()


if __name__ == "__main__":
    main()
