"""Tools to try out and develop the miner; the miner itself imports none of them.

The commands are in this directory, their code is in the packages:

* demo_node, test_runner, benchmark, fault_harness, fuzzer, vm_lab: of demo, test, bench, faults, fuzz and vm
* mock: doubles of coordinators; mock_coordinator.py starts a double
* lib: code that several tools share
"""
