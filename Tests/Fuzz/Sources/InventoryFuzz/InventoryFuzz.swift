// Fuzzes inventories of sites: whatever one says, every rule has an answer, and each disk gets one transport or none.
import Block
import FuzzSupport
import Transports

@main
struct InventoryFuzz {
    static func main() {
        fuzz { input in
            guard let site = try? Inventory(json: Array(input), from: "input") else { return }
            let rules = TransportRules(site, takesSnapshot: input.count % 2 == 0) { _ in nil }
            let plan = TransportPlan(rules)
            for machine in site.machines.prefix(8) {
                let choices = plan.choices(for: machine)
                require(
                    choices.count == machine.disks.count, "\(choices.count) choices of \(machine.disks.count) disks")
                for choice in choices {
                    require(choice.candidates.count == TransportKind.allCases.count, "a transport is missing")
                    let free = choice.candidates.firstIndex { $0.verdict != .excluded }
                    require(choice.position == free.map { $0 + 1 }, "not the first that is not excluded")
                    require(choice.reasons.count == (free ?? choice.candidates.count), "a reason is missing")
                }
                let proxies = ProxyChoice(for: machine, in: site)
                let all = site.proxies.count + (site.proxy == nil ? 0 : 1)
                require(proxies.eligible.count + proxies.refused.count == all, "a proxy was lost")
            }
            for host in site.hosts {
                require(SessionLimit.limits(of: host).allSatisfy { (0...10_000).contains($0.limit) }, "a limit")
            }
        }
    }
}
