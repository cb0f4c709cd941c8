"""The live view of `mrelay top`: tables, keys, a screen for one rule. Textual draws it.

Called by top. The relay is asked in a thread; one that goes is waited for, and said to be gone.
"""

import asyncio
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static

from mrelay.cli import output, top
from mrelay.cli.client import Client
from mrelay.cli.failure import Failure
from mrelay.cli.top_model import COLUMNS, SORTS, Model, Row, View, aligned

OUTPUTS: Final = ("OUTPUT", "PACKETS", "ERRORS", "STATE")


def fill(table: "DataTable[Text]", columns: tuple[str, ...], rows: list[Row]) -> None:
    """Show these rows, the cursor on the one that it was on."""
    right, cursor = aligned(columns), table.cursor_row
    on = table.ordered_rows[cursor].key.value if 0 <= cursor < table.row_count else None
    table.clear(columns=True)
    for column in columns:
        table.add_column(Text(column, justify="right" if column in right else "left"))
    for row in rows:
        cells = zip(columns, row.cells, strict=True)
        table.add_row(
            *(Text(cell, justify="right" if name in right else "left") for name, cell in cells), key=row.key
        )
    keys = [row.key for row in rows]
    table.move_cursor(row=keys.index(on) if on in keys else min(cursor, len(rows) - 1))


class RuleScreen(Screen[None]):
    """One rule: its outputs and its flows."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,left,backspace", "app.pop_screen", "Back")]

    def __init__(self, model: Model, rule: str) -> None:
        super().__init__()
        self._model, self._rule = model, rule

    def compose(self) -> ComposeResult:
        """As Textual calls it."""
        yield Static(id="rule", markup=False)
        yield DataTable[Text](id="outputs", cursor_type="none")
        yield DataTable[Text](id="flows", cursor_type="row")
        yield Static(id="note", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """As Textual calls it."""
        self.query_one("#flows").focus()
        self.show("")

    def show(self, note: str) -> None:
        """Draw what the model says now."""
        if not self.query("#note"):  # not composed yet: on_mount calls again
            return
        rule = self._model.rule(self._rule)
        self.query_one("#note", Static).update(note or self._model.summary()[1])
        if rule is None:
            self.query_one("#rule", Static).update(f"rule {self._rule} is gone")
            return
        rate = f"{output.scaled(rule['pps'], '')}packets/s   {output.scaled(rule['bps'], 'bit/s')}"
        line = f"rule {self._rule}: {rule['state']}\n{rate}   {self._model.spark(self._rule)}"
        self.query_one("#rule", Static).update(line)
        outputs = [
            Row(to["to"], (to["to"], output.count(to["packets"]), output.count(to["errors"]), to["state"]), "")
            for to in rule["outputs"]
        ]
        fill(self.query_one("#outputs", DataTable), OUTPUTS, outputs)
        fill(self.query_one("#flows", DataTable), COLUMNS["flows"], self._model.rows_of(self._rule))


class TopApp(App[None]):
    """All rules or flows."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary, #note, #rule { height: auto; padding: 0 1; }
    #summary, #rule { text-style: bold; }
    #table { height: 1fr; }
    #flows { height: 1fr; margin-top: 1; }
    #outputs { height: auto; max-height: 40%; margin-top: 1; }
    #filter { display: none; height: 3; }
    #filter.asked { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        Binding("tab", "turn", "Rules/flows", priority=True),  # it would go from widget to widget
        ("s", "sort", "Sort"),
        ("slash", "ask", "Filter"),
        ("escape", "clear", "All"),
    ]

    def __init__(self, client: Client, model: Model, view: View, sort: str, find: str, every: float) -> None:
        super().__init__()
        self._client, self._model, self._every = client, model, every
        self._view, self._sort, self._find = view, sort, find
        self._note = ""
        self._pid = 0
        self._rows: list[Row] = []

    def compose(self) -> ComposeResult:
        """As Textual calls it."""
        yield Static(id="summary", markup=False)
        yield DataTable[Text](id="table", cursor_type="row")
        yield Static(id="note", markup=False)
        yield Input(id="filter", placeholder="words that a line must have; Enter")
        yield Footer()

    def on_mount(self) -> None:
        """As Textual calls it."""
        self.screen.query_one("#table").focus()
        self._draw()
        self.run_worker(self._follow(), exit_on_error=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.to_thread(self._ask)
            try:
                self._draw()
            except NoMatches:  # the widgets are gone: so does the app
                return
            await asyncio.sleep(self._every)

    def _ask(self) -> None:
        """In a thread. What happened to the relay is said until it is well, or for as long as this is the news."""
        try:
            pid = self._client.get("/v1/health")["pid"]
            if self._pid not in (0, pid):
                self._model.forget()
                self._note = f"the relay was restarted: it is pid {pid} now"
            elif self._note.endswith("waiting for it"):
                self._note = ""
            self._pid = pid
            top.fetch(self._client, self._model, self._every)
        except Failure as failure:
            self._note = f"{failure.lines[0]}; waiting for it"

    def _draw(self) -> None:
        if isinstance(self.screen, RuleScreen):
            self.screen.show(self._note)
        base = self.screen_stack[0]
        base.query_one("#summary", Static).update("\n".join(self._model.summary()))
        self._rows = self._model.rows(self._view, self._sort, self._find)
        fill(base.query_one("#table", DataTable), COLUMNS[self._view], self._rows)
        self._say()

    def _say(self) -> None:
        """The news; else what is shown, and of the line under the cursor what may have had no room."""
        base, shown = self.screen_stack[0], f"{self._view} by {self._sort}"
        shown += f", only '{self._find}'" if self._find else ""
        for row in self._rows[base.query_one("#table", DataTable).cursor_row :][:1]:
            shown += f"   {row.cells[0]}: {row.cells[-1]}"
        base.query_one("#note", Static).update(self._note or shown)

    # ---- keys ------------------------------------------------------------------------------------

    def action_turn(self) -> None:
        """Rules, flows, rules."""
        self._view = "flows" if self._view == "rules" else "rules"
        self._draw()

    def action_sort(self) -> None:
        """The next order."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self._draw()

    def action_ask(self) -> None:
        """What to look for."""
        asked = self.screen_stack[0].query_one("#filter", Input)
        asked.add_class("asked")
        asked.focus()

    def action_clear(self) -> None:
        """Everything again."""
        self._look_for("")

    def on_input_submitted(self, message: Input.Submitted) -> None:
        """As Textual calls it."""
        self._look_for(message.value)

    def _look_for(self, text: str) -> None:
        self._find = text
        asked = self.screen_stack[0].query_one("#filter", Input)
        asked.remove_class("asked")
        self.screen_stack[0].query_one("#table").focus()
        self._draw()

    def on_data_table_row_highlighted(self, message: "DataTable.RowHighlighted") -> None:
        """The cursor moved."""
        if message.data_table.id == "table":
            self._say()

    def on_data_table_row_selected(self, message: "DataTable.RowSelected") -> None:
        """Enter on a line: its rule; of a flow, its first one."""
        key = message.row_key.value or ""
        rule = key if self._view == "rules" else self._model.rule_of(key)
        if rule and not isinstance(self.screen, RuleScreen):
            self.push_screen(RuleScreen(self._model, rule))
