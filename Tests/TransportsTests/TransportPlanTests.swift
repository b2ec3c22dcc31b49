// The choice for all disks of a machine: order, places and sessions that run out, tries that fail, the best proxy.
import Block
import Support
import Testing
import Transports

@Suite struct TransportPlanTests {
    private func choices(
        _ site: Inventory, _ order: String = "san:hotadd:nbdssl:nbd:file", sessions: [String: Int] = [:],
        inClear: Bool = false, trying attempt: TransportPlan.Attempt? = nil
    ) throws -> [TransportChoice] {
        let rules = TransportRules(site, takesSnapshot: true) { _ in nil }
        var plan = TransportPlan(rules, order: try TransportOrder(order), sessions: sessions)
        plan.takesClearText = inClear
        return plan.choices(for: site.machine, trying: attempt)
    }

    /// Another disk of the machine.
    private func add(_ count: Int, to site: inout Inventory) {
        for index in 1...count {
            var disk = site.disk
            disk.key = .init(stringLiteral: "\(2000 + index)")
            site.machine.disks.append(disk)
        }
    }

    @Test func theFirstThatWorksIsTaken() throws {
        #expect(try choices(site()).map(\.chosen) == [.san])
        #expect(try choices(site(), "nbd:san").map(\.chosen) == [.nbd])
        let vsan = try choices(site { $0.datastores[0].type = .vsan })[0]
        #expect(vsan.chosen == .hotadd && vsan.position == 2 && vsan.isDowngraded)
        #expect(vsan.reasons.count == 1 && vsan.reasons[0].hasPrefix("san: fast is a vSAN datastore"))
        #expect(vsan.summary.hasPrefix("hotadd (2nd of 5; san: fast is a vSAN datastore"))
    }

    @Test func eachDiskGoesItsOwnWay() throws {
        let mixed = try site {
            $0.datastores[0].type = .nfs
            add(1, to: &$0)
            $0.machine.disks[1].controller = .ide
        }
        #expect(try choices(mixed).map(\.chosen) == [.hotadd, .nbdssl])
    }

    @Test func nothingIsSaidWithItsReasons() throws {
        let choice = try choices(site { $0.datastores[0].type = .vsan }, "san")[0]
        #expect(choice.chosen == nil && choice.position == nil && choice.isDowngraded)
        #expect(choice.failure.message.contains("disk 2000 of web (vm-42)") && choice.failure.message.contains("vSAN"))
    }

    @Test func placesOnTheProxyRunOut() throws {
        let full = try site {
            $0.own.luns = []
            // Three places: 16 units less 7, less 12.
            $0.own.controllers = [.init(json: #"{"kind": "pvscsi", "usedUnits": [0,1,2,3,4,5,6,8,9,10,11,12]}"#)]
            add(4, to: &$0)
        }
        let chosen = try choices(full)
        #expect(chosen.map(\.chosen) == [.hotadd, .hotadd, .hotadd, .nbdssl, .nbdssl])
        #expect(chosen[3].reasons[1].contains("3 given to other disks of this machine"))
        // Disks that go another way take none.
        let mixed = try choices(
            {
                var site = full
                site.machine.disks[0].controller = .sata
                return site
            }())
        #expect(mixed.map(\.chosen) == [.nbdssl, .hotadd, .hotadd, .hotadd, .nbdssl])
    }

    @Test func sixtyDisksFitIntoFourAdaptersAndOneMoreDoesNot() throws {
        let many = try site {
            $0.own.luns = []
            $0.own.maximumDisks = nil
            $0.own.controllers = (0..<4).map { _ in .init(json: #"{"kind": "lsilogic"}"#) }
            add(60, to: &$0)
        }
        #expect(try choices(many).filter { $0.chosen == .hotadd }.count == 60)
    }

    @Test func sessionsOfAHostRunOut() throws {
        let busy = try site {
            add(2, to: &$0)
            $0.policy.waitsForSessions = false
            $0.hosts[0].sessionLimit = 10
        }
        let used = ["host esx1": 8]
        #expect(try choices(busy, "nbdssl:file", sessions: used).map(\.chosen) == [.nbdssl, .nbdssl, .file])
        // By default they wait for one.
        var patient = busy
        patient.policy.waitsForSessions = nil
        let waiting = try choices(patient, "nbdssl:file", sessions: used)
        #expect(waiting.map(\.chosen) == [.nbdssl, .nbdssl, .nbdssl])
        #expect(waiting[2].candidates[0].verdict == .warning)
        // The manager's limit counts for hosts that have none of their own left to give.
        var managed = busy
        managed.hosts[0].sessionLimit = nil
        let none = try choices(managed, "nbdssl:file", sessions: ["manager vc1": 52])
        #expect(
            none.map(\.chosen) == [.file, .file, .file]
                && none[0].reasons[0].contains("52 of 52 sessions of the manager"))
    }

    @Test func whatFailsWhenTriedIsPassedOver() throws {
        let named = try site {
            $0.disk.sources = ["san:fast/web/web-flat.vmdk?snapshot=a", "nbds://h/x", "nbd://h/x", "gopher:x"]
        }
        let tried = Locked<[String]>([])
        let choice = try choices(named) { (source, machine) throws(BlockError) in
            tried.withLock { $0.append("\(source)") }
            if source.transport != .nbd { throw BlockError(.inputOutput, "the cable is cut") }
        }[0]
        // hotadd has no source: it is taken for what the rules say, unless nothing but a source will do.
        #expect(choice.chosen == .hotadd && choice.reasons == ["san: the cable is cut"])
        #expect(tried.withLock { $0 } == ["san:fast/web/web-flat.vmdk?snapshot=a"])
        let onlyClear: TransportPlan.Attempt = { (source, _) throws(BlockError) in
            if source.transport != .nbd { throw BlockError(.inputOutput, "the cable is cut") }
        }
        let safe = try choices(named, "nbdssl:nbd", trying: onlyClear)[0]
        #expect(safe.chosen == nil && safe.candidates[1].findings.contains { $0.rule == "nbd.clear-text" })
        let network = try choices(named, "nbdssl:nbd", inClear: true, trying: onlyClear)[0]
        #expect(network.chosen == .nbd && network.position == 2)
        #expect(network.candidates[1].findings.contains { $0.rule == "nbd.tried" && $0.verdict == .ok })
        // What is excluded is not tried.
        let excluded = try choices(
            {
                var site = named
                site.own.luns = []
                return site
            }(), "san"
        ) { (_, _) throws(BlockError) in Issue.record("an excluded source was tried") }
        #expect(excluded[0].chosen == nil)
    }

    @Test func ordersAreTakenApart() throws {
        #expect(try TransportOrder("hotadd:NBD").kinds == [.hotadd, .nbd])
        #expect("\(try TransportOrder("file:san"))" == "file:san")
        for (text, word) in [
            ("", "empty"), ("san:", "empty"), ("scsi", "scsi is no transport"), ("san:nbd:san", "twice"),
        ] {
            do {
                _ = try TransportOrder(text)
                Issue.record("\(text) is an order")
            } catch { #expect(error.message.contains(word), "\(error)") }
        }
        do { _ = try TransportOrder("lan") } catch { #expect(error.message.contains("san, hotadd, nbdssl, nbd, file")) }
    }

    @Test func proxiesAreFoundFromDatastoresOverHosts() throws {
        let three = try site {
            var away = $0.own
            away.id = "vm-8"
            away.host = "esx2"
            away.controllers?[1].usedUnits = [1, 2, 3]
            var off = $0.own
            off.id = "vm-9"
            off.power = .off
            $0.proxies = [away, off]
        }
        let near = ProxyChoice(for: three.machine, in: three)
        #expect(near.datastores == ["fast"] && near.hosts == ["esx1", "esx2"])
        #expect(near.eligible.map(\.id) == ["vm-7", "vm-8"] && near.refused.map(\.reason) == ["it is off"])
        // The machine's own host comes first, whoever has more places.
        var moved = three
        moved.machine.host = "esx2"
        #expect(ProxyChoice(for: moved.machine, in: moved).eligible.map(\.id) == ["vm-8", "vm-7"])
        // One disk on a datastore that only esx2 mounts leaves its proxy, and the rules say so.
        var far = three
        add(1, to: &far)
        far.machine.disks[1].file = "[other] web/web_1.vmdk"
        let choice = ProxyChoice(for: far.machine, in: far)
        #expect(choice.hosts == ["esx2"] && choice.eligible.map(\.id) == ["vm-8"])
        let finding = TransportRules(far).findings(.hotadd, far.machine.disks[1], of: far.machine).first {
            $0.rule == "hotadd.host"
        }
        #expect(finding?.verdict == .excluded && finding?.remedy?.contains("proxy-1") == true)
        // An IDE disk elsewhere is not hot-added, and does not count.
        far.machine.disks[1].controller = .ide
        #expect(ProxyChoice(for: far.machine, in: far).eligible.count == 2)
        // Nobody on hosts in maintenance, on none that mounts all, with too few places.
        var maintained = three
        maintained.hosts[1].isInMaintenance = true
        #expect(ProxyChoice(for: maintained.machine, in: maintained).eligible.map(\.id) == ["vm-7"])
        var crowded = three
        add(60, to: &crowded)
        #expect(ProxyChoice(for: crowded.machine, in: crowded).eligible.isEmpty)
    }
}
