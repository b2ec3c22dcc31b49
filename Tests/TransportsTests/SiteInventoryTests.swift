// Which host of the inventory an address is, inventories that leave that open, and what rules mean for sources.
import Block
import Support
import Testing
import Transports

private func inventory(_ hosts: String) throws -> Inventory {
    try Inventory(json: Array(#"{"hosts": [\#(hosts)]}"#.utf8), from: "a test")
}

@Suite struct SiteInventoryTests {
    @Test(arguments: [
        ("esx1.example", "a"), ("ESX1.Example", "a"), ("esx1.example.", "a"), ("10.0.0.9", "a"), ("fd00::9", "a"),
        ("FD00:0:0:0:0:0:0:9", "a"), ("::ffff:10.0.0.9", "a"), ("b", "b"), ("B", "b"), ("esx1", nil),
        ("10.0.0.90", nil),
        ("fd00::90", nil), ("", nil),
    ])
    func hostsAreFoundByNamesAndAddresses(address: String, name: String?) throws {
        let site = try inventory(
            #"{"name": "a", "addresses": ["esx1.Example", "10.0.0.9", "[fd00:0::9]"]}, {"name": "b"}"#)
        #expect(site.host(at: address)?.name == name)
    }

    @Test(arguments: [
        (#"{"name": "a", "addresses": ["x"]}, {"name": "b", "addresses": ["X"]}"#, "the hosts a and b are both at x"),
        (#"{"name": "a"}, {"name": "b", "addresses": ["A"]}"#, "both at a"),
        (#"{"name": "a"}, {"name": "A"}"#, "both at"),
        (#"{"name": "a", "addresses": "10.0.0.9"}"#, "hosts.[0].addresses"),
        (#"{"name": "a", "addresses": [7]}"#, "hosts.[0].addresses"),
    ])
    func anAddressOfTwoHostsIsRefused(hosts: String, word: String) throws {
        do {
            _ = try inventory(hosts)
            Issue.record("\(hosts) was taken")
        } catch let error as BlockError { #expect(error.kind == .corrupt && error.message.contains(word), "\(error)") }
        // Twice at one host is once.
        #expect(try inventory(#"{"name": "a", "addresses": ["a", "A", "x", "X."]}"#).host(at: "x")?.name == "a")
    }

    private let excluded = Finding("file.path", .excluded, "a rule says so")

    /// Two sources of one disk, of which the rules may exclude some.
    private func disk(_ directory: TemporaryDirectory, _ findings: [TransportKind: [Finding]]) throws
        -> DiskSpecification
    {
        var disk = DiskSpecification(try SourceReference(directory.makeFile("disk.img", patternBytes(4096, seed: 1))))
        disk.alternatives = [try SourceReference("pattern:4K?seed=1")]
        disk.site = SiteDisk(title: "disk 1 of web", host: nil, policy: ChoicePolicy(), findings: findings)
        return disk
    }

    @Test func whatRulesExcludeIsNotTriedAndItsReasonStands() throws {
        try withTemporaryDirectory { directory in
            let chosen = try disk(directory, [.file: [excluded]]).openChosen()
            #expect(chosen.opened.info.format != "file" && chosen.choice.position == 2)
            #expect(chosen.choice.disk == "disk 1 of web" && chosen.choice.reasons == ["file: a rule says so"])
            #expect(chosen.choice.candidates[0].findings == [excluded])
            let fine = Finding("file.path", .warning, "it may work")
            let first = try disk(directory, [.file: [fine]]).openChosen()
            #expect(first.choice.position == 1 && first.choice.candidates[0].findings.first == fine)
        }
    }

    @Test func whatIsLeftIsKnownBeforeItIsOpened() throws {
        try withTemporaryDirectory { directory in
            let left = try disk(directory, [.file: [excluded]]).sourcesLeft()
            #expect(left.map(\.description) == ["pattern:4K?seed=1"])
            #expect(try disk(directory, [:]).sourcesLeft().count == 2)
        }
    }

    @Test func aDiskWithoutAnySourceLeftSaysWhy() throws {
        try withTemporaryDirectory { directory in
            var disk = try disk(directory, [.file: [excluded]])
            disk.alternatives = []
            for open in [{ _ = try disk.open() }, { _ = try disk.openChosen() }, { _ = try disk.sourcesLeft() }] {
                do {
                    try open()
                    Issue.record("it was opened")
                } catch let error as BlockError {
                    #expect(error.message.contains("disk 1 of web: none can be used: file: a rule says so"))
                }
            }
        }
    }

    @Test func whatRunsOutIsTakenByTheFirstTransportWithASource() throws {
        let limited = try site {
            $0.hosts[0].sessionLimit = 1
            $0.policy.waitsForSessions = false
            var second = $0.disk
            second.key = "2001"
            $0.machine.disks.append(second)
        }
        let plan = TransportPlan(TransportRules(limited) { _ in nil })
        func verdict(_ sources: [String]) throws -> [Finding.Verdict?] {
            let all = try sources.map { try SourceReference($0) }
            return plan.findings(for: limited.machine) { _ in all }.map { $0[.nbd]?.map(\.verdict).max() }
        }
        // The LUN comes first, and takes no session.
        #expect(try verdict(["nbd://esx1/x", "san:wwn=naa.600a1?snapshot=s"]).allSatisfy { $0 != .excluded })
        #expect(try verdict(["nbd://esx1/x"]).map { $0 == .excluded } == [false, true])
        #expect(try verdict(["pattern:4K"]) == [nil, nil])
    }

    @Test func aFileThatIsSaidIsTheDisksPath() throws {
        let said = try site { $0.disk.sources = ["nbd://esx1/x", "file:///mnt/web.vmdk"] }
        let rules = TransportRules(said) { path in path == "/mnt/web.vmdk" ? "it is not there" : nil }
        let finding = rules.findings(.file, said.disk, of: said.machine).first { $0.rule == "file.path" }
        #expect(finding?.reason == "/mnt/web.vmdk cannot be read: it is not there", "\(String(describing: finding))")
    }
}
