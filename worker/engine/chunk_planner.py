"""Which sequences of one dp coordinate have a chunk in the next step, how long it is and where its pages are.

What the dp coordinate holds is `dp_state.py`'s; who is in which step that was sent out, `steps.py`'s.
"""

from dataclasses import dataclass, field

from parallel.chunk import cut_segments
from parallel.page_columns import packed
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from proto import step_pb2
from worker.engine.dp_state import DpState
from worker.engine.sequence import Sequence


@dataclass(kw_only=True)
class DpStep:
    """What one dp coordinate does in a step. `rows` and `draws` are counted by cp rank; `reached` says of sequences up
    to which position all is computed when the step has finished, where a window may move on by that.
    """

    rows: list[int]
    draws: list[int]
    plan: step_pb2.StepPlan = field(default_factory=step_pb2.StepPlan)
    sequences: list[Sequence] = field(default_factory=list)
    reached: list[tuple[Sequence, int]] = field(default_factory=list)


class ChunkPlanner:
    """Plans the chunks of one dp coordinate: decoding sequences first, then prompts, up to the batch's budget."""

    def __init__(self, state: DpState, *, shape: ReplicaShape, settings: EngineSettings) -> None:
        self._state = state
        self._pages = state.pages
        self._windows = state.pages.windows
        self._cp, self._tp = shape.attention.cp, shape.attention.tp
        self._num_writers = shape.ranks_per_sequence
        self._page_size = settings.page_size
        self._budget = settings.max_batch_tokens

    def plan_step(self, *, parts: int) -> DpStep:
        """The chunks of the next step, with their pages taken and the sequences' counts moved on: one of `parts` of the
        decoding sequences, and of prompts what is left of the budget.
        """
        step = DpStep(rows=[0] * self._cp, draws=[0] * self._cp)
        self._plan_decode(step, parts=parts)
        budget = self._budget - len(step.sequences)
        for sequence in list(self._state.prompts.values()):
            new_tokens = self._prompt_tokens(sequence, budget=budget)
            if new_tokens:
                budget -= new_tokens
                self._plan_prompt(step, sequence, end=sequence.planned_tokens + new_tokens)
        return step

    def complete(self, step: DpStep, *, step_id: int, padded_rows: int, padded_draws: int) -> step_pb2.StepPlan:
        """The message of a step that goes out."""
        plan = step.plan
        plan.step_id, plan.padded_rows, plan.padded_draws = step_id, padded_rows, padded_draws
        # As many as share out over tp: a rank without rows computes none. A captured graph would ask for more.
        plan.local_rows.extend(-(-rows // self._tp) for rows in step.rows)
        plan.leaves.extend(self._state.take_leaves())
        plan.new_pages.extend(self._pages.take_new_pages())
        return plan

    # ---- decode ----

    def _plan_decode(self, step: DpStep, *, parts: int) -> None:
        """One token of each sequence whose turn it is. This is the loop of a large batch: most tokens are a count."""
        slots: list[int] = []
        for home, sequences in enumerate(self._state.turns.next_turn(parts=parts, budget=self._budget)):
            others = len(slots)
            for sequence in sequences:
                position = sequence.planned_tokens
                if position >= sequence.plain_until and not self._prepare_token(step, sequence, position):
                    continue
                sequence.planned_tokens = position + 1
                sequence.in_flight += 1
                slots.append(sequence.slot)
                step.sequences.append(sequence)
            step.rows[home] = step.draws[home] = len(slots) - others
        step.plan.decode_slots = packed(slots)
        self._state.tokens_ahead -= len(slots)

    def _prepare_token(self, step: DpStep, sequence: Sequence, position: int) -> bool:
        """All that the token at `position` needs besides counting; False where a page that it needs is held by other
        steps: it waits.
        """
        request_id, home = sequence.request_id, sequence.home
        place, offset = divmod(position, self._page_size)
        if offset == 0 and not self._pages.has_page(request_id, home=home):
            return False
        if not sequence.joined:
            step.plan.joins.append(self._state.join(sequence))
        if offset == 0:
            self._pages.begin_page(request_id, slot=sequence.slot, place=place, home=home)
        end = position + 1
        if any((end + 1 - window) % self._page_size == 0 for window in self._windows):
            step.reached.append((sequence, end))
        if sequence.is_probed:
            self._probe(step, sequence, end=end)
        if end == sequence.compute_end:
            self._state.turns.discard(sequence)
        sequence.plain_until = end if sequence.is_probed else self._next_event(sequence, end)
        return True

    def _next_event(self, sequence: Sequence, position: int) -> int:
        """The first position from `position` on that begins a page, lets a window leave one, or is the last."""
        size = self._page_size
        window_steps = [position + (window - 2 - position) % size for window in self._windows]
        return min(position + -position % size, sequence.compute_end - 1, *window_steps)

    # ---- prompts ----

    def _prompt_tokens(self, sequence: Sequence, *, budget: int) -> int:
        """How many tokens of its prompt come next: all that are left, or as many as end a page inside the budget and
        find pages in groups with a window.
        """
        if budget < 1 or (sequence.handoff and sequence.target is None):
            return 0
        start, size = sequence.planned_tokens, self._page_size
        most = self._pages.most_to_begin(sequence.request_id)
        if most is not None:
            budget = min(budget, (-(-start // size) + most) * size - start)
        left = sequence.prefill_end - start
        if left <= budget:
            return left
        whole_pages = (start + budget) // size * size - start
        return whole_pages if whole_pages > 0 else budget

    def _plan_prompt(self, step: DpStep, sequence: Sequence, *, end: int) -> None:
        start = sequence.planned_tokens
        if not sequence.joined:
            step.plan.joins.append(self._state.join(sequence))
        owners = self._pages.begin_chunk(sequence.request_id, slot=sequence.slot, start=start, end=end)
        segments = cut_segments(start=start, end=end, page_size=self._page_size, owners=owners)
        for cp_rank, rows in enumerate(segments.rows_by_rank(self._cp).tolist()):
            step.rows[cp_rank] += rows
        is_last = end == sequence.prefill_end
        step.draws[int(segments.cp_rank[-1])] += is_last
        step.plan.prompts.add(slot=sequence.slot, token_ids=packed(sequence.tokens[start:end]), sample=is_last)
        step.sequences.append(sequence)
        if self._windows:
            step.reached.append((sequence, end))
        # Steps run in order, so who reads these pages finds them written.
        self._state.publish(sequence, start=start, end=end)
        sequence.planned_tokens = end
        sequence.in_flight += 1
        self._state.tokens_ahead -= end - start
        if sequence.handoff:
            sequence.writes.num_pending += self._num_writers
        if is_last:
            self._end_prompt(step, sequence)

    def _end_prompt(self, step: DpStep, sequence: Sequence) -> None:
        """The last chunk of a prompt is planned: it draws a token, and gives back what was promised and not taken."""
        if sequence.is_probed:
            self._probe(step, sequence, end=sequence.prefill_end)
        del self._state.prompts[sequence.request_id]
        self._pages.settle(sequence.request_id, home=None if sequence.handoff else sequence.home)
        self._state.has_freed = True
        if sequence.tokens_ahead:
            self._state.decode(sequence)

    def _probe(self, step: DpStep, sequence: Sequence, *, end: int) -> None:
        """What is asked of the token that is drawn from the position before `end`."""
        number = end - sequence.num_given
        forced_id = sequence.forced_ids[number] if number < len(sequence.forced_ids) else None
        step.plan.probes.add(slot=sequence.slot, forced_id=forced_id, logits=sequence.wants_logits)
