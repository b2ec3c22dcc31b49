// Fuzzes the ledgers of runs: whatever a crash has left of one, it is listed, taken over, worked off.
import Block
import FuzzSupport
import Glibc
import LinuxIO
import Transports

@main
struct LedgerFuzz {
    static func main() {
        let folder = FuzzFolder()
        mkdir("\(folder.path)/obligations", 0o700)
        fuzz { input in
            let path = folder.write("obligations/a.run", Array(input))
            guard let (runs, problems) = try? RunLedger.list(stateDirectory: folder.path) else {
                return require(false, "the ledgers cannot be listed")
            }
            require(runs.count + problems.count == 1, "\(runs.count) runs and \(problems.count) problems")
            guard let (ledgers, _) = try? RunLedger.takeAbandoned(stateDirectory: folder.path) else {
                return require(false, "the ledgers cannot be taken over")
            }
            require(ledgers.count == runs.count, "a run that is listed cannot be taken over")
            guard let ledger = ledgers.first else { return }
            require(ledger.obligations == runs[0].obligations, "other obligations than were listed")
            guard let made = try? ledger.intend("test.thing", ["name": "new"]) else {
                return require(false, "nothing can be added")
            }
            try? ledger.learn(made, ["more": "known"])
            let ids = ledger.obligations.map(\.id)
            require(ids.count(where: { $0 == made.id }) == 1, "two obligations have the number \(made.id)")
            let again = try? RunLedger.list(stateDirectory: folder.path).runs
            require(again?.first?.obligations == ledger.obligations, "what was added is not there")
            for obligation in ledger.obligations.reversed() { try? ledger.settle(obligation) }
            require(ledger.obligations.isEmpty, "something was not settled")
            try? ledger.end()
            require((access(path, F_OK) < 0) == (ledger.damage == nil), "a damaged ledger has to stay, another to go")
        }
    }
}
