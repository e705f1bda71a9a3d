"""What a program shows while it works: a progress bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Screen:
    """A progress bar on a terminal, lines elsewhere. Only the main process shows anything."""

    def __init__(self, total: int, done: int, shown: bool, seconds: float = 20, unit: str = "step") -> None:
        self.total, self.shown, self.seconds, self.unit = total, shown, seconds, unit
        self.first: tuple[float, int] | None = None  # time and number of the first step that was shown
        self.last, self.noted = 0.0, time.monotonic()
        self.bar = None
        if shown and sys.stdout and sys.stdout.isatty():  # there is none where it was closed
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"))
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def show(self, done: int, text: str) -> None:
        """Show that so many steps are done."""
        if not self.shown:
            return
        now = time.monotonic()
        begun, first = self.first = self.first or (now, done)
        if self.bar:
            self.bar.update(self.task, completed=done, description=text)
        elif now - self.last > self.seconds or done == self.total:
            self.last = now
            if done > first:
                hours, rest = divmod(round((now - begun) / (done - first) * (self.total - done)), 3600)
                text += f"  {hours}:{rest // 60:02d}:{rest % 60:02d} left"
            print(f"{self.unit} {done}/{self.total}  {text}", flush=True)

    def note(self, text: str) -> None:
        """Show what is being done between steps: as the bar's text, or a line every few seconds."""
        if self.bar:
            self.bar.update(self.task, description=text)
        elif self.shown and time.monotonic() - max(self.last, self.noted) > self.seconds:
            self.noted = time.monotonic()
            print(text, flush=True)

    def say(self, text: str | None) -> None:
        """Print a line, if there is one."""
        if self.shown and text:
            print(text, flush=True)  # rich prints it above the bar

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar:
            self.bar.stop()
