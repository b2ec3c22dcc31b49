// Full and incremental snapshots of a real QEMU's disks: every one is its point in time, byte for byte.
import Block
import LinuxIO
import Support
import Testing
import Transports

@testable import Hypervisors

@Suite(.enabled(if: QEMUProcess.isAvailable), .serialized)
struct QEMUBackupTests {
    @Test func machineIsDescribed() throws {
        try withQEMU(
            [("vda", "qcow2"), ("vdb", "raw")],
            ["-drive", "if=ide,media=cdrom", "-name", "shop", "-uuid", "11111111-2222-3333-4444-555555555555"]
        ) { process in
            let machine = try Hypervisors.open(process.uri).inspect()
            #expect(machine.name == "shop")
            #expect(machine.id == "11111111-2222-3333-4444-555555555555")
            #expect(machine.isRunning && !machine.hasGuestAgent)
            #expect(machine.disks.map(\.id).sorted() == ["ide0-cd0", "vda", "vdb"])
            for disk in machine.disks {
                #expect((disk.obstacle == nil) == disk.id.hasPrefix("vd"))
                if disk.obstacle == nil { #expect(disk.size == 16 << 20) }
            }
            let words = try #require(machine.documents.first { $0.name == "qemu-command-line.txt" })
            #expect(String(decoding: words.content, as: UTF8.self).contains("-name\nshop\n"))
            #expect(machine.documents.contains { $0.name == "qemu.json" })
        }
    }

    @Test func fullThenIncrementalsEqualTheirPointsInTime() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            let copy = process.directory.file("copy.raw")
            var ledger = try begin(process)
            var truth = try process.content(process.disks[0], "truth.raw")
            let full = try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: ledger)
            // What comes after the point in time is none of the backup's.
            try process.io("vda", "write -q -P 0x22 1M 3M")
            #expect(full.consistency == .crashConsistent)
            #expect(full.disks[0].changedContext == nil && full.disks[0].downgrade == nil)
            try copyWhole(full.disks[0], to: copy)
            try full.check(isLast: true)
            try full.finish(adopting: true)
            try ledger.end()
            try requireEqual(copy, truth, "the full copy")
            for round in 2...4 {
                try process.io("vda", "write -q -P \(round) \(round)M 128k")
                try process.io("vda", "write -z -u -q 6M 64k")
                try process.io("vda", "discard -q 7M 64k")
                truth = try process.content(process.disks[0], "truth.raw")
                ledger = try begin(process)
                let session = try provider.begin(
                    request(["vda"], since: "diskgate-r-\(round - 1)", checkpoint: "r-\(round)"), ledger: ledger)
                try process.io("vda", "write -q -P 0x99 0 512k")
                #expect(session.disks[0].downgrade == nil)
                #expect(session.disks[0].checkpoint == OwnName.checkpoint("r-\(round)", of: "vda"))
                let bytes = try copyChanges(session.disks[0], onto: copy)
                #expect(bytes == (round == 2 ? 3 << 20 : 512 << 10) + (round == 2 ? 128 << 10 : 256 << 10))
                try session.finish(adopting: true)
                try ledger.end()
                try requireEqual(copy, truth, "the incremental \(round)")
                #expect(try process.bitmaps("vda") == ["diskgate-r-\(round)"])
            }
            #expect(try process.leftovers().isEmpty)
        }
    }

    @Test func disksOfAMachineShareOnePointInTime() throws {
        try withQEMU([("vda", "qcow2"), ("vdb", "qcow2"), ("vdc", "raw")]) { process in
            let provider = try Hypervisors.open(process.uri)
            let ledger = try begin(process)
            let first = try provider.begin(request(["vda", "vdb", "vdc"], checkpoint: "r-1"), ledger: ledger)
            try first.finish(adopting: true)
            #expect(first.warnings.contains { $0.hasPrefix("vdc:") })
            for disk in process.disks { try process.io(disk.id, "write -q -P 0x33 2M 64k") }
            let next = try begin(process)
            let session = try provider.begin(
                request(["vda", "vdb", "vdc"], since: "diskgate-r-1", checkpoint: "r-2"), ledger: next)
            for disk in process.disks { try process.io(disk.id, "write -q -P 0x44 2M 64k") }
            #expect(session.disks.map(\.id) == ["vda", "vdb", "vdc"])
            for (disk, image) in zip(session.disks, process.disks) {
                #expect(disk.downgrade == nil)
                let copy = process.directory.file("copy.raw")
                try copyWhole(disk, to: copy)
                let bytes = try contentOfFile(copy)
                #expect(bytes[2 << 20] == 0x33, "\(image.id)")
                #expect(try copyChanges(disk, onto: copy) == 65536)
            }
            try session.finish(adopting: true)
            #expect(try process.leftovers().isEmpty)
        }
    }

    @Test func failedRunMissesNothing() throws {
        try withQEMU { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda"], checkpoint: "r-1"), ledger: begin(process)).finish(adopting: true)
            let copy = try process.content(process.disks[0], "copy.raw")
            try process.io("vda", "write -q -P 0x33 2M 64k")
            let failed = try provider.begin(
                request(["vda"], since: "r-1", checkpoint: "r-2"), ledger: begin(process))
            try process.io("vda", "write -q -P 0x44 3M 64k")
            try failed.finish(adopting: false)
            #expect(try process.bitmaps("vda") == ["diskgate-r-1"])
            try process.io("vda", "write -q -P 0x55 4M 64k")
            let truth = try process.content(process.disks[0], "truth.raw")
            let session = try provider.begin(
                request(["vda"], since: "r-1", checkpoint: "r-3"), ledger: begin(process))
            #expect(try copyChanges(session.disks[0], onto: copy) == 3 * 65536)
            try session.finish(adopting: true)
            try requireEqual(copy, truth, "the copy after a failed run")
        }
    }

    @Test func checkpointOutlivesAnOrderlyEndOfQEMU() throws {
        try withQEMU([("vda", "qcow2"), ("vdb", "raw")]) { process in
            let provider = try Hypervisors.open(process.uri)
            try provider.begin(request(["vda", "vdb"], checkpoint: "r-1"), ledger: begin(process))
                .finish(adopting: true)
            try process.io("vda", "write -q -P 0x33 2M 64k")
            try process.quit()
            try process.start()
            try process.io("vda", "write -q -P 0x33 4M 64k")
            let session = try provider.begin(
                request(["vda", "vdb"], since: "r-1", checkpoint: "r-2"), ledger: begin(process))
            #expect(session.disks[0].downgrade == nil)
            let copy = process.directory.file("copy.raw")
            try copyWhole(session.disks[0], to: copy)
            #expect(try copyChanges(session.disks[0], onto: copy) == 2 * 65536)
            // A raw image keeps no bitmap.
            #expect(session.disks[1].downgrade?.contains("not there any more") == true)
            #expect(session.disks[1].changedContext == nil)
            try session.finish(adopting: true)
        }
    }
}
