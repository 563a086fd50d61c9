"""Fine-tune a model on private text, privately and hardened against attack, and prove what came of it.

    accelerate launch recipes/harden.py CONFIG [--set option=value ...] [--resume]

The story, top to bottom: load the data and the keys; plan the privacy budget; train a plain model to
compare with; train the private, hardened one and seal it; measure all three models; report; pass the release
gate; publish; and open what was published the way its receiver will.
"""

import argparse
from functools import partial

from securetune.cli.output import clean_exit, console
from securetune.config.loader import load_recipe
from securetune.config.packaged import find_config
from securetune.config.schema import Recipe
from securetune.files import write_atomic
from securetune.models.base import choose_device, load_base
from securetune.publishing import check_gate, publish
from securetune.report.assemble import assemble_report
from securetune.report.html import render_html
from securetune.report.summary import report_json
from securetune.report.terminal import results_table
from securetune.report.verdict import headline
from securetune.training.access import Access, prepare_access
from securetune.training.evaluate import collect_evidence, evaluate_subject, forget_plain_model
from securetune.training.finetune import fine_tune
from securetune.training.folder import RunFolder
from securetune.training.plan import make_plan, write_plan
from securetune.training.prepare import prepare_data
from securetune.training.release import release_evidence
from securetune.training.reopen import check_reopens
from securetune.training.strategy import Strategy, start_strategy
from securetune.training.trackers import start_trackers

out = console()


def main() -> None:
    """Run the recipe named on the command line.

    Exit status: 0 for a published model, 1 for a failed release gate, 2 for anything that needs the user.
    """
    arguments = _parse_arguments()
    with clean_exit():
        recipe = load_recipe(find_config(arguments.config), arguments.set)
        choose_device(recipe.model.device)  # a GPU that is not there is refused before anything is made
        strategy = start_strategy(recipe)
        with strategy.open_run(recipe, resume=arguments.resume) as run:
            harden(recipe, run, strategy)


def harden(recipe: Recipe, run: RunFolder, strategy: Strategy) -> None:
    """Run every stage that is not done yet: training on all processes, the rest on the first."""
    out.quiet = not strategy.is_first
    trackers = start_trackers(recipe, run) if strategy.is_first else None
    access = strategy.each(partial(prepare_access, recipe, run))

    with run.stage("data and plan"):
        base = load_base(recipe.model)
        data = strategy.each(partial(prepare_data, recipe, run, base.tokenizer))
        plan = make_plan(recipe, base=base, tokens_per_record=data.mean_tokens)
        strategy.on_first(partial(write_plan, plan, run))
        out.print(plan.render())
        del base

    log = None if trackers is None else trackers.log
    with run.stage("plain fine-tune"), strategy.guard():
        fine_tune("plain", recipe, run, access, data, plan, log=log, strategy=strategy)
    with run.stage("hardened training"), strategy.guard():
        fine_tune("hardened", recipe, run, access, data, plan, log=log, strategy=strategy)
    strategy.finish()
    if trackers is None:
        return

    for subject in ("base", "plain", "hardened"):
        with run.stage(f"evaluate {subject}"):
            evaluate_subject(subject, recipe, run, access, data)
    forget_plain_model(run)

    with run.stage("report"):
        base = load_base(recipe.model)
        measured = collect_evidence(recipe, run)
        gate = check_gate(recipe.gate.rules, measured.evidence)
        report = assemble_report(recipe, run, plan, data, base, measured, gate=gate)
        write_atomic(run.report_json, report_json(report))
        write_atomic(run.report_html, render_html(report))
        del base
    out.print(results_table(report))
    out.print(headline(report))
    out.print(f"Report: {run.report_html}")

    with run.stage("publish"):
        released = release_evidence(recipe, run, measured.evidence) if gate.passed else []
        published = publish(
            run.checkpoint,
            recipe.publish_folder,
            report,
            rules=recipe.gate.rules,
            signing_key=access.signing_key,
            released=released,
        )
        if not run.has("reopened"):
            _reopen(recipe, run, access)
    out.print(f"Published {len(published.files)} files to {published.folder}.")
    _print_times(run)
    trackers.end_training()


def _reopen(recipe: Recipe, run: RunFolder, access: Access) -> None:
    difference = check_reopens(recipe, access, recipe.publish_folder, run.public_key)
    run.save("reopened", {"largest_logit_difference": difference})
    out.print(f"Re-opened in a fresh process: same outputs (logits within {difference:.1e}).")


def _print_times(run: RunFolder) -> None:
    times = run.stage_times()
    out.print("  ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
    out.print(f"Total {sum(times.values()) / 60:.1f} min")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="recipe (YAML), or a name that 'securetune ls' shows")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="change an option; repeatable"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    return parser.parse_args()


if __name__ == "__main__":
    main()
