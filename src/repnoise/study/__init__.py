"""One study: its identity, and the stages that go from run folder to run folder: defend, measure, attack, report."""
