"""What jobs cost, experiments and reports: pure functions first, then real masters and real encodes."""
from __future__ import annotations

import unittest
from typing import Any

import ffdist
from ffdist import NO_TARIFF, PRICED, Rate, Tariff, hourly_rate_of, rates_of
from tests.support import TOP, Case, run

NOON = 1_767_009_600.0  # 2025-12-29T12:00:00Z
METRICS = {"energy_joules": 7200.0, "duration": 60.0, "output_seconds": 120.0}


def no_file(name: str) -> str:
    raise FileNotFoundError(2, "No such file or directory")


class TestRates(unittest.TestCase):
    """Prices and carbon intensities by hour and node."""

    def test_a_number_is_of_every_hour(self) -> None:
        self.assertEqual(Rate(0.3).mean(NOON, 1e6), 0.3)

    def test_hours_count_by_their_share_of_the_time(self) -> None:
        rate = hourly_rate_of("hour,price\n12,1\n13,4\n", 0)
        self.assertAlmostEqual(rate.mean(NOON + 1800, 3600), 2.5)
        self.assertAlmostEqual(rate.mean(NOON + 3000, 1200), 2.5)
        self.assertAlmostEqual(rate.mean(NOON + 2700, 3600), 1 * 0.25 + 4 * 0.75)
        self.assertEqual(rate.mean(NOON, 0), 1)

    def test_an_hour_of_the_day_is_that_of_every_day_and_a_dated_one_is_not(self) -> None:
        self.assertEqual(hourly_rate_of("hour,x\n12,7", 0).mean(NOON + 86400 * 40, 5), 7)
        dated = hourly_rate_of("time,g,note\n2025-12-29T13:00:00+01:00,7,cold\n\n2025-12-29T13:00:00Z,9\n", 0)
        self.assertEqual((dated.mean(NOON, 5), dated.mean(NOON + 3600, 5)), (7, 9))
        with self.assertRaisesRegex(LookupError, "2025-12-30T12Z"):
            dated.mean(NOON + 86400, 5)

    def test_a_bad_file_is_one_sentence_with_its_line(self) -> None:
        for text, words in (
                ("", "line 1: the header"), ("price\n0.3\n", "line 1: the header"),
                ("0,0.3\n", "line 1: the header"), ("hour,price\n", "line 2: there must be a value"),
                ("hour,price\n24,1\n", "line 2: '24,1' must be an hour from 0 to 23"),
                ("hour,price\n-1,1\n", "line 2"), ("hour,price\n0,1\n\n0,2\n", "line 4: 0 stands .* twice"),
                ("hour,price\n1,free\n", "line 2"), ("hour,price\n1\n", "line 2"),
                ("hour,price\n1,nan\n", "line 2: nan is no value"), ("hour,price\n1,inf\n", "line 2"),
                ("hour,price\n1,-2\n", "line 2: -2 is no value from 0"),
                ("time,price\n2025-12-29T12:30:00Z,1\n", "line 2.*whole hour"),
                ("time,price\n2025-12-29T12:00:00,1\n", "line 2"), ("time,price\nnoon,1\n", "line 2")):
            with self.subTest(text), self.assertRaisesRegex(ValueError, words):
                hourly_rate_of(text, 0)

    def test_a_price_may_be_below_nothing(self) -> None:
        self.assertEqual(hourly_rate_of("hour,price\n1,-0.02", ffdist.PRICE_LOWEST).by_hour, {1: -0.02})

    def test_rates_by_node(self) -> None:
        rates = rates_of("0.30,worker-01=0.22,b=day.csv", {"day.csv": "hour,p\n3,9\n"}.__getitem__)
        self.assertEqual((rates[""], rates["worker-01"]), (Rate(0.3), Rate(0.22)))
        self.assertEqual(rates["b"].by_hour, {3: 9.0})

    def test_bad_rates_are_one_sentence(self) -> None:
        for text, words in (("0.3,0.4", "one for each node"), ("a=", "numbers or files"), ("", "numbers"),
                            ("gone.csv", "'gone.csv' is no number, and no file to read: No such"),
                            ("-3", "'-3' must be a number from 0"), ("nan", "'nan' must be a number")):
            with self.subTest(text), self.assertRaisesRegex(ValueError, words):
                rates_of(text, no_file)
        with self.assertRaisesRegex(ValueError, "^day.csv: line 2: "):
            rates_of("day.csv", lambda name: "hour,p\nx,1\n")


class TestPriced(unittest.TestCase):
    """What the master adds to the metrics of a result."""

    def test_cost_and_carbon_of_known_joules(self) -> None:
        made = Tariff({"": Rate(0.3)}, {"": Rate(400.0)}, "EUR").priced(METRICS, ("w", "id"), NOON)
        self.assertEqual({name: made[name] for name in PRICED}, {
            "energy_cost": 0.0006, "carbon_g": 0.8, "energy_wh_per_minute": 1.0, "cost_per_minute": 0.0003,
            "carbon_g_per_minute": 0.4})
        self.assertEqual((made["currency"], made["unknown"]), ("EUR", {}))
        self.assertEqual({name: made[name] for name in METRICS}, METRICS)

    def test_a_node_has_its_own_price_by_name_or_id(self) -> None:
        tariff = Tariff({"": Rate(0.3), "w": Rate(0.1), "id": Rate(0.2)})
        costs = [tariff.priced(METRICS, names, NOON)["energy_cost"]
                 for names in (("w", "other"), ("x", "id"), ("x", "y"))]
        self.assertEqual(costs, [0.0002, 0.0004, 0.0006])

    def test_unknown_is_null_with_a_reason(self) -> None:
        tariff = Tariff({"": Rate(None, {1: 1.0}, True)})
        sent = {**METRICS, "output_seconds": None, "unknown": {"output_seconds": "the attempt failed"}}
        made = tariff.priced(sent, ("w",), NOON)
        self.assertEqual([made[name] for name in PRICED], [None] * 5)
        self.assertEqual(made["unknown"], {
            "output_seconds": "the attempt failed",
            "energy_cost": "the file of --energy-price has no 2025-12-29T12Z",
            "carbon_g": "the master has no --carbon-intensity for this node",
            "energy_wh_per_minute": "the output's length is unknown",
            "cost_per_minute": "the file of --energy-price has no 2025-12-29T12Z",
            "carbon_g_per_minute": "the master has no --carbon-intensity for this node"})
        self.assertEqual(sent["unknown"], {"output_seconds": "the attempt failed"})

    def test_unknown_energy_gives_its_own_reason(self) -> None:
        made = NO_TARIFF.priced({"energy_joules": None, "unknown": {"energy_joules": "no RAPL"}}, (), NOON)
        self.assertEqual(made["unknown"], dict.fromkeys(("energy_joules", *PRICED), "no RAPL"))

    def test_the_small_metrics_of_a_seed_agent_stay_as_they_are_without_a_tariff(self) -> None:
        sent = {"cpu_usage": 75.5, "memory_usage": 2048, "duration": 5.0}
        self.assertEqual(NO_TARIFF.priced(sent, ("w",), NOON), sent)
        made = Tariff({"": Rate(1.0)}).priced(sent, ("w",), NOON)
        self.assertEqual(made["unknown"]["energy_cost"], "the node tells no energy")

    def test_nonsense_of_an_agent_does_no_harm(self) -> None:
        tariff = Tariff({"": Rate(None, dict.fromkeys(range(24), 1.0), True)})
        for name, value in (("duration", 1e300), ("duration", "long"), ("energy_joules", -1),
                            ("energy_joules", True), ("output_seconds", []), ("unknown", "all")):
            with self.subTest(name=name, value=value):
                made = tariff.priced({**METRICS, name: value}, ("w",), NOON)
                self.assertLessEqual(set(PRICED), set(made))
                self.assertIsInstance(made["unknown"], dict)


class TestWords(unittest.TestCase):
    def test_amounts_have_three_digits_and_no_exponent(self) -> None:
        for value, text in ((0.0000123, "0.0000123 EUR"), (0.5, "0.500 EUR"), (12.34, "12.3 EUR"),
                            (12345.6, "12346 EUR"), (0, "0.00 EUR"), (-0.02, "-0.0200 EUR")):
            self.assertEqual(ffdist.amount_text(value, "EUR"), text)
        self.assertIsNone(ffdist.amount_text(None, "EUR"))

    def test_the_cost_of_a_job_is_one_phrase(self) -> None:
        made = Tariff({"": Rate(0.3)}, {"": Rate(400.0)}, "EUR").priced(METRICS, ("w",), NOON)
        self.assertEqual(ffdist.cost_text(made), "2.00 Wh, 0.000600 EUR, 0.800 g CO2e; a minute of output: "
                         "1.00 Wh, 0.000300 EUR, 0.400 g CO2e")
        self.assertTrue((ffdist.cost_text({**made, "energy_estimated": True}) or "").startswith("~2.00 Wh"))
        self.assertIsNone(ffdist.cost_text({"cpu_usage": 3}))


class TestPricesOfARealMaster(Case):
    def finish(self, master: Any, metrics: Any) -> str:
        """Let a node that a test plays run a job, and return the job's id."""
        node = master.register("worker-01")
        master.submit("720p30-h264")
        job = master.get(f"/jobs/next?node_id={node['id']}")["job"]
        answer = master.call("POST", "/results", {"job_id": job["id"], "node_id": node["id"], "status":
                                                  "completed", "metrics": metrics})
        self.assertEqual(answer.status, 200, answer)
        return job["id"]

    def test_a_result_is_priced_when_it_is_accepted_and_people_see_it(self) -> None:
        (self.folder / "day.csv").write_text("hour,price\n" + "".join(f"{hour},0.5\n" for hour in range(24)))
        master = self.master("--energy-price", f"0.1,worker-01={self.folder / 'day.csv'}",
                             "--carbon-intensity", "400", "--currency", "EUR")
        job_id = self.finish(master, METRICS)
        kept = master.get(f"/jobs/{job_id}")["result"]["metrics"]
        self.assertEqual([kept[name] for name in (*PRICED, "currency")],
                         [0.001, 0.8, 1.0, 0.0005, 0.4, "EUR"])
        shown = run(str(TOP / "ffdist.py"), "show", job_id, "--master", master.url, folder=self.folder).stdout
        self.assertIn("0.00100 EUR, 0.800 g CO2e", shown)
        shown = run(str(TOP / "ffdist.py"), "results", "--master", master.url, folder=self.folder).stdout
        self.assertRegex(shown, r"2\.00 Wh +0\.00100 EUR +0\.800 g")

    def test_without_a_tariff_small_metrics_are_kept_as_they_came(self) -> None:
        master = self.master()
        sent = {"cpu_usage": 75.5, "memory_usage": 2048, "duration": 5.0}
        job_id = self.finish(master, sent)
        self.assertEqual(master.get(f"/jobs/{job_id}")["result"]["metrics"], sent)

    def test_a_bad_file_stops_the_master_at_its_start(self) -> None:
        (self.folder / "day.csv").write_text("hour,price\n0,0.5\n1,cheap\n")
        made = run(str(TOP / "ffdist.py"), "master", "--energy-price", "day.csv", "--port", "0",
                   folder=self.folder)
        self.assertEqual(made.returncode, 2)
        self.assertRegex(made.stderr, r"^ffdist: --energy-price day.csv: line 3: '1,cheap' must be .*\n$")


if __name__ == "__main__":
    unittest.main()
