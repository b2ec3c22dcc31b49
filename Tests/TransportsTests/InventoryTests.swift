// Inventories as people and programs write them: what is missing, unknown, hostile or twice.
import Block
import FoundationEssentials
import Glibc
import LinuxIO
import Support
import Testing
import Transports

private func inventory(_ text: String) throws -> Inventory { try Inventory(json: Array(text.utf8), from: "a test") }

/// A value that was written as JSON and read again.
private func storedAndRead<Value: Codable>(_ value: Value) throws -> Value {
    let values = try JSONDecoder().decode([Value].self, from: try JSONEncoder().encode([value]))
    return try #require(values.first)
}

@Suite struct InventoryTests {
    @Test func theSiteIsRead() throws {
        let site = try site()
        #expect(site.datastores.map(\.type) == [.vmfs6, .vmfs5] && site.own.controllers?[1].kind == .pvscsi)
        #expect(site.disk.key == "2000" && site.disk.capacity == 40 << 30 && site.machine.title == "web (vm-42)")
        #expect(try site.machine(named: "web") == site.machine && site.machine(named: "vm-42") == site.machine)
        try requireError(.notFound, "no such machine") { _ = try site.machine(named: "db") }
    }

    @Test func whatIsNotKnownIsPassedOver() throws {
        let site = try inventory(
            """
            {"future": {"deep": [1, 2]}, "datastores": [{"name": "a", "type": "zfs-9", "colour": "red"}],
             "hosts": [{"name": "h", "kind": "cray"}],
             "machines": [{"id": "m", "power": "dreaming", "disks": [
                {"key": "vda", "controller": "holographic", "sharing": "maybe", "rawMapping": "half",
                 "busSharing": ""}]}]}
            """)
        #expect(site.datastores[0].type == .unknown && site.hosts[0].kind == .unknown)
        #expect(site.machine.power == .unknown && site.disk.controller == .unknown && site.disk.sharing == .unknown)
        #expect(site.disk.rawMapping == .unknown && site.disk.busSharing == .unknown)
        for transport in TransportKind.allCases {
            _ = TransportRules(site).findings(transport, site.disk, of: site.machine)
        }
    }

    @Test func hypervisorsOwnWordsAreUnderstood() throws {
        let site = try inventory(
            """
            {"datastores": [{"name": "a", "type": "NFS41"}, {"name": "b", "type": "VMFS"},
              {"name": "c", "type": "VMFS-6"}],
             "machines": [{"id": "m", "power": "poweredOn", "disks": [
                {"key": 1, "controller": "ParaVirtualSCSIController", "sharing": "sharingMultiWriter",
                 "rawMapping": "physicalMode", "busSharing": "noSharing"},
                {"key": 2, "controller": "VirtualAHCIController"}]}]}
            """)
        #expect(site.datastores.map(\.type) == [.nfs, .vmfs, .vmfs6] && site.machine.power == .on)
        #expect(site.disk.controller == .pvscsi && site.disk.sharing == .multiwriter)
        #expect(site.disk.rawMapping == .physical && site.disk.busSharing == Inventory.BusSharing.none)
        #expect(site.machine.disks[1].controller == .sata)
    }

    @Test(arguments: [
        ("", "a test"), ("[]", "a test"), ("{", "a test"),
        (#"{"machines": [{"disks": []}]}"#, "id is missing at machines.[0]"),
        (#"{"machines": [{"id": "a"}]}"#, "disks is missing"),
        (#"{"machines": [{"id": "a", "disks": [{"key": "k", "capacity": -1}]}]}"#, "figures is negative"),
        (#"{"machines": [{"id": "a", "disks": [{"key": "k", "capacity": 1e30}]}]}"#, "figures is negative"),
        (#"{"machines": [{"id": "a", "disks": [{"key": "k", "capacity": "9"}]}]}"#, "machines.[0].disks.[0].capacity"),
        (#"{"machines": [{"id": "a", "disks": [{"key": true}]}]}"#, "key"),
        (#"{"datastores": [{"name": "a", "type": 7}]}"#, "datastores.[0].type"),
        (#"{"machines": [{"id": "a", "disks": []}, {"id": "a", "disks": []}]}"#, "two machines called a"),
        (#"{"hosts": [{"name": "a"}, {"name": "a"}]}"#, "two hosts called a"),
        (#"{"datastores": [{"name": "a"}, {"name": "a"}]}"#, "two datastores called a"),
    ])
    func whatIsNoInventoryIsRefusedWithItsPlace(text: String, word: String) throws {
        do {
            _ = try inventory(text)
            Issue.record("\(text) is an inventory")
        } catch let error as BlockError { #expect(error.kind == .corrupt && error.message.contains(word), "\(error)") }
    }

    @Test func hostileFiguresCostNothing() throws {
        let site = try site {
            $0.own.controllers = [
                .init(
                    json: #"{"kind": "pvscsi", "units": \#(Int.max), "usedUnits": [-1, \#(Int.min), \#(Int.max), 7]}"#),
                .init(json: #"{"kind": "pvscsi", "units": \#(Int.min)}"#),
            ]
            $0.own.maximumDisks = .max
            $0.disk.capacity = .max
            $0.hosts[0].sessionLimit = .max
            $0.datastores[0].blockSize = .max
            $0.datastores[0].type = .vmfs3
            $0.disk.file = "[" + String(repeating: "x", count: 100_000)
        }
        for transport in TransportKind.allCases {
            _ = TransportRules(site).findings(transport, site.disk, of: site.machine)
        }
        let slots = TransportRules(site).findings(.hotadd, site.disk, of: site.machine).first {
            $0.rule == "hotadd.slots"
        }
        #expect(slots?.verdict == .ok && slots?.reason.contains("255 of 255") == true, "\(slots?.reason ?? "")")
    }

    @Test func twoMachinesOfOneNameAreNamedByTheirIds() throws {
        let twins = try site {
            var twin = $0.machine
            twin.id = "vm-43"
            $0.machines.append(twin)
        }
        #expect(try twins.machine(named: "vm-43").id == "vm-43")
        try requireError(.invalid, "an ambiguous name") { _ = try twins.machine(named: "web") }
    }

    @Test func aFileThatIsTooLargeIsNotRead() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeSparseFile("site.json", size: 65 << 20)
            try requireError(.tooLarge, "a large inventory") { _ = try Inventory.read(path) }
            try requireError(.notFound, "none") { _ = try Inventory.read(directory.file("none")) }
        }
    }

    @Test func theMachineItselfFillsInWhatIsAskedFor() throws {
        var facts = MachineFacts()
        facts.luns = [.init(node: "/dev/sdb", names: ["naa.6", "t10.x"])]
        facts.openSSL = .success("OpenSSL 3")
        facts.protection = Finding("hotadd.protection", .excluded, "no rule")
        var asked = try site {
            $0.own.discover = true
            $0.own.luns = nil
            $0.own.libraries = nil
            $0.own.isProtected = nil
        }
        asked.discover(facts)
        #expect(
            asked.own.luns == ["naa.6", "t10.x"] && asked.own.libraries == ["openssl"] && asked.own.isProtected == false
        )
        // What this machine cannot find out stays unknown.
        var unclear = asked
        unclear.own.isProtected = nil
        facts.protection = Finding("hotadd.protection", .warning, "not root")
        unclear.discover(facts)
        #expect(unclear.own.isProtected == nil)
        // What somebody has said stays, and so does what nobody asked for.
        var said = try site { $0.own.discover = true }
        said.discover(facts)
        #expect(said.own.luns == ["naa.600a1", "NAA.600A2"])
        var unasked = try site { $0.own.luns = nil }
        unasked.discover(facts)
        #expect(unasked.own.luns == nil)
    }

    @Test func choicesSurviveBeingStored() throws {
        let vsan = try site { $0.datastores[0].type = .vsan }
        let choices = TransportPlan(TransportRules(vsan)).choices(for: vsan.machine)
        let again = try storedAndRead(choices)
        #expect(!choices.isEmpty && again == choices)
        #expect(try storedAndRead(vsan) == vsan)
        #expect(try storedAndRead(TransportOrder("nbd:san")) == TransportOrder("nbd:san"))
    }
}
