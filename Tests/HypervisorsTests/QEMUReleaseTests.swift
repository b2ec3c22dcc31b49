// What is left behind is taken back: after crashes of diskgate, of QEMU, and beside the things of others.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@testable import Hypervisors

@Suite(.enabled(if: QEMUProcess.isAvailable), .serialized)
struct QEMUReleaseTests {
    @Test func everythingIsGivenBackByAnotherProcess() throws {
        try withQEMU([("vda", "qcow2"), ("vdb", "raw")]) { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda", "vdb"], checkpoint: "r-1"), ledger: begin(process))
                .finish(adopting: true)
            _ = try provider.begin(request(["vda", "vdb"], since: "r-1", checkpoint: "r-2"), ledger: begin(process))
            #expect(try process.bitmaps("vda") == ["diskgate-r-1", "diskgate-r-2"])
            #expect(try process.leftovers().isEmpty == false)
            // While a backup is at work, nothing is taken from under it, and no other begins.
            #expect(throws: BlockError.self) { try provider.unprotect() }
            #expect(try provider.inspect().disks.allSatisfy { $0.obstacle != nil })
            let obligations = try RunLedger.list(stateDirectory: process.directory.file("state")).runs
                .flatMap(\.obligations)
            let kinds = Set(obligations.map(\.kind))
            #expect(kinds == ["qemu.directory", "qemu.node", "qemu.server", "qemu.checkpoint", "qemu.job"])
            // Each by a connection of its own, and all of them once more: what is gone is success.
            for _ in 0..<2 {
                for obligation in obligations.reversed() {
                    try Hypervisors.open(process.uri).settle(obligation, adopted: false)
                }
            }
            #expect(try process.leftovers().isEmpty)
            #expect(try process.bitmaps("vda") == ["diskgate-r-1"])
            #expect(try process.bitmaps("vdb") == ["diskgate-r-1"])
            try settleAll(process)
            // The next run is as if nothing had been.
            let session = try provider.begin(
                request(["vda", "vdb"], since: "r-1", checkpoint: "r-3"), ledger: begin(process))
            #expect(session.disks.allSatisfy { $0.downgrade == nil })
            try session.finish(adopting: true)
            #expect(try process.bitmaps("vda") == ["diskgate-r-3"])
        }
    }

    @Test func adoptedCheckpointReplacesTheOneBeforeAfterACrash() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            _ = try provider.begin(request(["vda"], since: "r-1", checkpoint: "r-2"), ledger: begin(process))
            try settleAll(process, adopted: true)
            #expect(try process.bitmaps("vda") == ["diskgate-r-2"])
            #expect(try process.leftovers().isEmpty)
        }
    }

    @Test func crashOfQEMUMeansAFullBackupAndLeavesNothing() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            var ledger: RunLedger? = try begin(process)
            var session: (any SnapshotSession)? = try provider.begin(
                request(["vda"], since: "r-1", checkpoint: "r-2"), ledger: try #require(ledger))
            process.kill()
            #expect(throws: BlockError.self) { try session?.check(isLast: true) }
            // The bitmap may be in the image: that cannot be known before QEMU runs again.
            #expect(throws: BlockError.self) { try session?.finish(adopting: false) }
            #expect(ledger?.obligations.map(\.kind) == ["qemu.checkpoint"])
            (session, ledger) = (nil, nil)
            #expect(throws: BlockError.self) { try provider.inspect() }
            try process.start()
            try settleAll(process)
            #expect(try process.leftovers().isEmpty)
            let next = try provider.begin(request(["vda"], since: "r-1", checkpoint: "r-3"), ledger: begin(process))
            #expect(next.disks[0].changedContext == nil && next.disks[0].downgrade != nil)
            try next.finish(adopting: true)
            #expect(try process.bitmaps("vda") == ["diskgate-r-3"])
        }
    }

    @Test func missingSocketIsNoProofThatQEMUIsGone() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            _ = try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process))
            let aside = process.directory.file("aside.sock")
            try require(rename(process.monitor, aside) == 0, "moving the monitor's socket")
            let obligations = try RunLedger.list(stateDirectory: process.directory.file("state")).runs.flatMap(
                \.obligations)
            for obligation in obligations {
                #expect(throws: BlockError.self) { try provider.settle(obligation, adopted: false) }
            }
            try require(rename(aside, process.monitor) == 0, "moving the monitor's socket back")
            // What QEMU still uses is not taken from under it.
            for obligation in obligations where obligation.kind == "qemu.directory" {
                try requireError(.denied, "removing a directory in use") {
                    try provider.settle(obligation, adopted: false)
                }
            }
            try settleAll(process)
            #expect(try process.leftovers().isEmpty)
            _ = try provider.begin(request(["vda"], checkpoint: "r-2"), ledger: begin(process))
            try process.quit()
            unlink(process.monitor)
            // Now the process is gone: only what may be in the image has to wait.
            for obligation in try RunLedger.list(stateDirectory: process.directory.file("state")).runs
                .flatMap(\.obligations)
            where obligation.kind != "qemu.checkpoint" {
                try provider.settle(obligation, adopted: false)
            }
        }
    }

    @Test func adoptedCheckpointLeavesLaterOnes() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            let ledger = try begin(process)
            let session = try provider.begin(request(["vda"], since: "r-1", checkpoint: "r-2"), ledger: ledger)
            let settled = ledger.obligations
            try session.finish(adopting: true)
            try provider.begin(request(["vda"], since: "r-2", checkpoint: "r-3"), ledger: begin(process))
                .finish(adopting: false)
            try process.own {
                try $0.execute(
                    "block-dirty-bitmap-add",
                    ["node": "node-vda", "name": .text(OwnName.checkpoint("r-3", of: "vda"))])
            }
            for obligation in settled.reversed() where obligation.kind == "qemu.checkpoint" {
                try provider.settle(obligation, adopted: true)
            }
            #expect(try process.bitmaps("vda") == ["diskgate-r-2", "diskgate-r-3"])
        }
    }

    @Test func bitmapOfAnotherDiskIsNotTaken() throws {
        try withQEMU([("vda", "qcow2"), ("vdb", "qcow2")]) { process in
            let provider = try Hypervisors.open(process.uri)
            let first = try provider.begin(request(["vda", "vdb"], checkpoint: "r-1"), ledger: begin(process))
            let names = first.disks.map(\.checkpoint)
            #expect(names[0] != names[1])
            try first.finish(adopting: true)
            let session = try provider.begin(
                request(["vdb"], since: names[0], checkpoint: "r-2"), ledger: begin(process))
            #expect(session.disks[0].changedContext == nil && session.disks[0].downgrade != nil)
            try session.finish(adopting: true)
        }
    }

    @Test func inconsistentBitmapMeansAFullBackup() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            // Once it was in the image in order, a crash makes QEMU distrust it.
            try process.quit()
            try process.start()
            try process.io("vda", "write -q -P 0x33 2M 64k")
            process.kill()
            try process.start()
            #expect(try provider.inspect().disks[0].checkpoints.isEmpty)
            let session = try provider.begin(request(["vda"], since: "r-1", checkpoint: "r-2"), ledger: begin(process))
            #expect(session.disks[0].downgrade?.contains("not consistent") == true)
            try session.finish(adopting: true)
            #expect(try process.bitmaps("vda") == ["diskgate-r-2"])
        }
    }

    @Test func whatOthersHaveMadeIsLeftAlone() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try process.own {
                for name in ["theirs", "diskgate-other-1"] {
                    try $0.execute("block-dirty-bitmap-add", ["node": "node-vda", "name": .text(name)])
                }
            }
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            let session = try provider.begin(
                request(["vda"], since: "theirs", checkpoint: "r-2"), ledger: begin(process))
            #expect(session.disks[0].downgrade != nil && session.disks[0].changedContext == nil)
            try session.finish(adopting: true)
            // Another repository's checkpoint is of another series.
            #expect(try process.bitmaps("vda") == ["diskgate-other-1", "diskgate-r-2", "theirs"])
            #expect(try provider.unprotect().count == 2)
            #expect(try process.bitmaps("vda") == ["theirs"])
            // A server that others have started is neither used nor stopped.
            let socket = process.directory.file("theirs.sock")
            try process.own {
                try $0.execute("nbd-server-start", ["addr": ["type": "unix", "data": ["path": .text(socket)]]])
            }
            let ledger = try begin(process)
            #expect(throws: BlockError.self) { try provider.begin(request(["vda"], checkpoint: "r-3"), ledger: ledger) }
            #expect(ledger.obligations.isEmpty)
            #expect(!isAbandonedSocket(socket))
            #expect(try process.leftovers().isEmpty)
            #expect(try process.bitmaps("vda") == ["theirs"])
        }
    }

    @Test func disksThatAreNotThereAreErrors() throws {
        try withQEMU([("vda", "qcow2")], ["-drive", "if=ide,media=cdrom"]) { process in
            let provider = try Hypervisors.open(process.uri)
            let ledger = try begin(process)
            for disks in [["vdz"], ["ide0-cd0"], [], ["vda", "vdz"]] {
                #expect(throws: BlockError.self) {
                    try provider.begin(request(disks, checkpoint: "r-1"), ledger: ledger)
                }
            }
            var elsewhere = request(["vda"], checkpoint: "r-1")
            elsewhere.scratchDirectory = "relative"
            #expect(throws: BlockError.self) { try provider.begin(elsewhere, ledger: ledger) }
            #expect(ledger.obligations.isEmpty)
            #expect(try process.leftovers().isEmpty)
            #expect(try process.bitmaps("vda").isEmpty)
        }
    }

    @Test(.enabled(if: SmallFileSystem.isAvailable)) func fullScratchSpaceEndsTheBackupNotTheGuest() throws {
        try withQEMU { process in
            try SmallFileSystem.with { small in
                let provider = try Hypervisors.open(process.uri)
                try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
                var wanted = request(["vda"], since: "r-1", checkpoint: "r-2")
                wanted.scratchDirectory = small.path
                wanted.scratchReserve = 256 << 10
                let session = try provider.begin(wanted, ledger: begin(process))
                try session.check(isLast: true)
                for block in 0..<13 { try process.io("vda", "write -q -P 0x33 \(block * 512)k 64k") }
                try requireError(.noSpace, "checking the scratch space") { try session.check(isLast: true) }
                try session.finish(adopting: false)
                try process.io("vda", "write -q -P 0x44 0 8M")
                #expect(try namesInDirectory(small.path).isEmpty)
                #expect(try process.bitmaps("vda") == ["diskgate-r-1"])
            }
        }
    }
}
