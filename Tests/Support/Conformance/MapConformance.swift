// The suite's part about maps and status: what covers what, in which order, and lists that are full.
import Block

extension DeviceConformance {
    func checkMaps(_ subject: ConformanceSubject) throws {
        for range in ranges(of: subject.device.info.size, random: 20) {
            for capacity in [1, 2, 3, 64] {
                try checkMap(subject, range, .blocking, capacity)
                try checkMap(subject, range, .resident, capacity)
            }
            try checkMapAppends(subject.device, range)
        }
    }

    /// Maps a range piece by piece until its end, or until `.resident` knows no more.
    private func checkMap(
        _ subject: ConformanceSubject, _ range: Range<UInt64>, _ patience: Patience, _ capacity: Int
    ) throws {
        let device = subject.device
        let what = "mapping \(range) .\(patience) into \(capacity)"
        var list = ExtentList(capacity: capacity)
        var position = range.lowerBound
        while position < range.upperBound {
            list.removeAll()
            let end = try device.map(position..<range.upperBound, patience, into: &list)
            try require(end >= position && end <= range.upperBound, "\(what): from \(position) to \(end)")
            try require(list.length == end - position, "\(what): \(list.length) bytes from \(position) to \(end)")
            if patience == .blocking {
                try require(end > position, "\(what): nothing covered at \(position)")
                try require(
                    end == range.upperBound || list.count == capacity,
                    "\(what): stopped at \(end) with \(list.count) extents")
            } else {
                var blocking = ExtentList(capacity: capacity)
                let known = try device.map(position..<range.upperBound, .blocking, into: &blocking)
                try require(end <= known, "\(what): \(end) is past \(known), which .blocking says")
            }
            try checkExtents(list, what, subject, at: position)
            if end == position { return }
            position = end
        }
    }

    private func checkExtents(
        _ list: borrowing ExtentList, _ what: String, _ subject: ConformanceSubject, at start: UInt64
    ) throws {
        var position = start
        for index in 0..<list.count {
            let extent = list[index]
            try require(extent.length > 0, "\(what): an empty extent at \(position)")
            if index > 0 {
                let previous = list[index - 1]
                try require(!joins(previous, extent), "\(what): extents that could be one at \(position)")
            }
            if case .zeros = extent.place {
                let bytes = subject.content[Int(position)..<Int(position + extent.length)]
                try require(areZeros(bytes), "\(what): zeros at \(position), but the content is not")
            }
            position += extent.length
        }
    }

    private func joins(_ first: Extent, _ second: Extent) -> Bool {
        switch (first.place.advanced(by: first.length), second.place) {
        case (.file(let a, let end), .file(let b, let start)): a == b && end == start
        case (.source(let a, let end), .source(let b, let start)): a == b && end == start
        case (.zeros(let a), .zeros(let b)): a == b
        default: false
        }
    }

    /// What is in the list already stays, and a full list stays as it is.
    private func checkMapAppends(_ device: any BlockDevice, _ range: Range<UInt64>) throws {
        // A place that no device's map continues.
        let stranger = Place.file(FileRef(descriptor: -1, traits: []), offset: 0)
        var full = ExtentList(capacity: 1)
        _ = full.append(7, stranger)
        let end = try device.map(range, .blocking, into: &full)
        try require(
            end == range.lowerBound && full.count == 1 && full.length == 7, "mapping \(range) into a full list: \(end)")
        var list = ExtentList(capacity: 2)
        _ = list.append(7, stranger)
        let mapped = try device.map(range, .blocking, into: &list)
        try require(
            mapped > range.lowerBound && list.count == 2 && list[0].length == 7
                && list[1].length == mapped - range.lowerBound, "mapping \(range) behind another extent")
    }

    func checkStatus(_ subject: ConformanceSubject) throws {
        let device = subject.device
        var contexts: [StatusContext] = [.allocation, .depth]
        contexts += device.info.dirtyBitmaps.indices.map { .dirtyBitmap($0) }
        for range in ranges(of: device.info.size, random: 10) {
            for context in contexts {
                var whole: [StatusExtent] = []
                for capacity in [1000, 3, 2, 1] {
                    let found = try collectStatus(subject, context, range, capacity)
                    if whole.isEmpty { whole = found }
                    let isSame = zip(found, whole).allSatisfy { $0.length == $1.length && $0.value == $1.value }
                    try require(
                        found.count == whole.count && isSame,
                        "status \(context) of \(range) with \(capacity): \(found), at once \(whole)")
                }
            }
        }
        var list = StatusList(capacity: 1)
        do {
            _ = try device.status(.dirtyBitmap(9999), of: 0..<1, into: &list)
            throw CheckFailure("status of a dirty bitmap that does not exist was answered")
        } catch let error as BlockError { try require(error.kind == .invalid, "unknown dirty bitmap: .\(error.kind)") }
    }

    /// The status of a range, asked piece by piece and joined again.
    private func collectStatus(
        _ subject: ConformanceSubject, _ context: StatusContext, _ range: Range<UInt64>, _ capacity: Int
    ) throws -> [StatusExtent] {
        let what = "status \(context) of \(range) into \(capacity)"
        var collected: [StatusExtent] = []
        var position = range.lowerBound
        while position < range.upperBound {
            var list = StatusList(capacity: capacity)
            let end = try subject.device.status(context, of: position..<range.upperBound, into: &list)
            try require(end > position && end <= range.upperBound, "\(what): from \(position) to \(end)")
            try require(list.length == end - position, "\(what): \(list.length) bytes from \(position) to \(end)")
            try require(
                end == range.upperBound || list.extents.count == capacity,
                "\(what): stopped at \(end) with \(list.extents.count) extents")
            for extent in list.extents {
                try require(extent.length > 0, "\(what): an empty extent at \(position)")
                try checkValue(extent, context, what, subject, at: position)
                position += extent.length
                if let last = collected.last, last.value == extent.value {
                    collected[collected.count - 1].length += extent.length
                } else {
                    collected.append(extent)
                }
            }
            let values = list.extents.map(\.value)
            try require(zip(values, values.dropFirst()).allSatisfy { $0 != $1 }, "\(what): extents that could be one")
        }
        return collected
    }

    private func checkValue(
        _ extent: StatusExtent, _ context: StatusContext, _ what: String, _ subject: ConformanceSubject,
        at start: UInt64
    ) throws {
        switch context {
        case .allocation:
            try require(extent.value <= 3, "\(what): flags \(extent.value)")
            if extent.value & AllocationFlags.zero != 0 {
                let bytes = subject.content[Int(start)..<Int(start + extent.length)]
                try require(areZeros(bytes), "\(what): zeros at \(start), but the content is not")
            }
        case .depth:
            try require(
                extent.value <= 1 || subject.device.info.hasLayers, "\(what): depth \(extent.value) without layers")
        case .dirtyBitmap: try require(extent.value <= 1, "\(what): \(extent.value)")
        }
    }
}
