"""Tools for those who try out or work on the miner; nothing of the miner itself imports them.

What a person starts lies here; its code is in the packages:

* demo_node, test_runner, benchmark, fault_harness, fuzzer, vm_lab: of demo, test, bench, faults, fuzz and vm
* mock: doubles of coordinators; mock_coordinator.py starts one
* lib: what several of them use
"""
